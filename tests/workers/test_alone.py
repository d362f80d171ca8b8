"""Steps of a sequence that is alone are those that arrays make."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.errors import EngineError
from tests.workers.engine_fakes import EOG, FakeDecoder, job
from tests.workers.test_stepper import Rig
from workers.alone import Alone
from workers.shape import Shape
from workers.slots import NOBODY

STEADY = Shape(steady=True, pad_tokens=8, moves=True, keeps=True, copy_tokens=4)
Seen = tuple[Any, ...]


def run(
    jobs: list[tuple[int, int, bool]], codes: list[int], damaged: bool, together: bool, shape: Shape, alone: bool
) -> Seen:
    """All that can be seen of `jobs`, (last token of the prompt, most tokens, whether the end is ignored), in two slots
    or one after another. `codes`: of the first decodes; `damaged`: the third step's logits of the first slot are NaN.
    """
    rig, found = Rig(slots=2, shape=shape), list[Any]()
    rig.decoder.codes = list(codes)
    never = mock.patch.object(Alone, "slot", return_value=NOBODY) if not alone else contextlib.nullcontext()
    try:
        with never:
            for key, (token, most, endless) in enumerate(jobs):
                rig.submit(job(key, (1, token), max_tokens=most, ignore_eos=endless))
                for _ in range(2):
                    rig.stepper.step()
                if damaged:
                    rig.decoder.damage = {0}
                if not together:
                    rig.run()
            rig.run()
    except EngineError as error:
        found.append(str(error))
    answers = rig.answers()
    found += [(answers[key].choices, answers[key].error) for key in sorted(answers)]
    rig.meter.close(rig.now)
    sums = [
        sum(getattr(stats, name) for stats in rig.stats)
        for name in ("steps", "reading_steps", "prompt_tokens", "output_tokens")
    ]
    gaps = sum(sum(stats.itl_counts) for stats in rig.stats)
    return *found, sums, gaps, rig.decoder.batches, rig.decoder.emptied, rig.decoder.cells


@pytest.mark.parametrize("shape", [Shape(), STEADY], ids=["CPU", "GPU"])
@pytest.mark.parametrize("chooses", [False, True], ids=["host", "device"])
@given(
    jobs=st.lists(st.tuples(st.integers(EOG - 12, EOG - 1), st.integers(1, 20), st.booleans()), min_size=1, max_size=3),
    codes=st.lists(st.sampled_from([0, 0, 0, 0, 1, -1, -2]), max_size=6),
    damaged=st.booleans(),
    together=st.booleans(),
)
def test_nothing_differs(
    shape: Shape, chooses: bool, jobs: list[tuple[int, int, bool]], codes: list[int], damaged: bool, together: bool
) -> None:
    with mock.patch.multiple(FakeDecoder, chooses=chooses, asynchronous=shape.steady):
        assert run(jobs, codes, damaged, together, shape, True) == run(jobs, codes, damaged, together, shape, False)


def steps_alone(rig: Rig) -> int:
    """How many steps were made alone until nothing was left."""
    count = 0
    feed = Alone.feed

    def counted(self: Alone, slot: int) -> int:
        nonlocal count
        count += 1
        return feed(self, slot)

    with mock.patch.object(Alone, "feed", counted):
        rig.run()
    return count


def test_all_steps_but_the_first_are_made_alone() -> None:
    rig = Rig()
    rig.submit(job(1, max_tokens=9))
    assert steps_alone(rig) == 8


@pytest.mark.parametrize(
    "asked",
    [{"stream": True}, {"stop": ("zz",)}, {"temperature": 1.0}, {"logprobs": 2}, {"n": 2, "temperature": 1.0}],
    ids=["streamed", "stop strings", "sampled", "log-probabilities", "two choices"],
)
def test_what_needs_more_is_not(asked: dict[str, Any]) -> None:
    rig = Rig()
    rig.submit(job(1, max_tokens=9, **asked))
    assert steps_alone(rig) == 0


def test_whoever_comes_is_taken_in() -> None:
    rig = Rig()
    rig.submit(job(1, max_tokens=9))
    for _ in range(4):
        rig.stepper.step()
    rig.submit(job(2, (7,), max_tokens=3))
    assert {key: answer.choices[0].output_tokens for key, answer in rig.run().items()} == {1: 9, 2: 3}
