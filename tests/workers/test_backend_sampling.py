"""Tokens that llama.cpp's own device chooses, here the CPU, against those chosen from logits on the host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from scheduling.constraints import Constraint
from scheduling.requests import Request, Sampling
from tests.workers.test_engine import PROMPTS, Session, chat, config, counted
from tests.workers.test_supervisor import PATIENCE_S, listen
from workers.protocol import Answer, EngineConfig, Job

lib = pytest.importorskip("llama_cpp.llama_cpp", reason="llama-cpp-python is not installed")
backend_sampling = pytest.importorskip("workers.backend_sampling")

SCHEMA = (
    '{"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": false}'
)


def on(where: str, made: EngineConfig) -> EngineConfig:
    return msgspec.structs.replace(made, sample_on=where, steady_batches=True)


def of_all_kinds() -> list[Job]:
    """Greedy texts, and between them those that need their logits."""
    jobs = [chat(place, prompt) for place, prompt in enumerate(PROMPTS[:5])]
    jobs += [chat(100 + k, PROMPTS[k], temperature=0.9, top_p=0.9, seed=k) for k in range(3)]
    jobs += [chat(600 + k, PROMPTS[k], temperature=(1.0, 0.7, 1.3)[k % 3], seed=k) for k in range(6)]
    jobs += [chat(700 + k, PROMPTS[k], temperature=1.0, seed=k, ignore_eos=True, max_tokens=40) for k in range(2)]
    jobs += [chat(200 + k, PROMPTS[k], repeat_penalty=1.2) for k in range(2)]
    jobs += [chat(300 + k, PROMPTS[k], ignore_eos=True, max_tokens=40) for k in range(2)]
    jobs += [chat(400, PROMPTS[0], constraint=Constraint("schema", SCHEMA))]
    for key in (500, 501):
        asking = chat(key, PROMPTS[key - 500])
        jobs.append(msgspec.structs.replace(asking, request=msgspec.structs.replace(asking.request, logprobs=2)))
    return jobs


def answered(made: EngineConfig, jobs: list[Job]) -> dict[int, Answer]:
    session = Session(made)
    got = session.ask(*jobs)
    session.engine.close(PATIENCE_S)
    session.said += listen(session.engine) + session.engine.poll()
    assert got.keys() == {job.key for job in jobs}
    assert counted(session.said)[1] == sum(answer.output_tokens for answer in got.values())
    return got


def test_one_slot_says_the_same_wherever_tokens_are_chosen(real_model: Path) -> None:
    jobs = of_all_kinds()
    host, device = (answered(on(where, config(real_model, slots=1)), jobs) for where in ("host", "device"))
    assert all(answer.error is None for answer in host.values())
    assert {key: answer.choices for key, answer in device.items()} == {
        key: answer.choices for key, answer in host.items()
    }


def test_many_slots_say_the_same_but_for_rounding(real_model: Path) -> None:
    jobs = of_all_kinds()
    # Where cells are used again, a processor rounds by whose they were.
    made = msgspec.structs.replace(config(real_model, slots=8), prefix_reuse=False)
    host, device = (answered(on(where, made), jobs) for where in ("host", "device"))
    assert all(answer.error is None for answer in device.values())
    same = sum(device[key].choices[0].text == host[key].choices[0].text for key in host)
    assert same >= 0.8 * len(jobs)


def test_drafts_are_checked_there_too(real_model: Path) -> None:
    made = msgspec.structs.replace(config(real_model, slots=2), speculate="always")
    jobs = [chat(k, f"Repeat this: one two three four one two three four {k}", max_tokens=40) for k in range(6)]
    host, device = (answered(on(where, made), jobs) for where in ("host", "device"))
    assert {key: answer.error for key, answer in device.items()} == dict.fromkeys(host)
    same = sum(device[key].choices[0].text == host[key].choices[0].text for key in host)
    assert same >= 5


def test_prompts_longer_than_a_batch_and_more_requests_than_slots(tiny_model: Path) -> None:
    made = on("device", config(tiny_model, slots=5, contexts=2, batch_tokens=64))
    sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
    jobs = [
        Job(
            k,
            0,
            False,
            Request(custom_id=str(k), kind="completion", prompt=(1 + k,) * (k * 9 % 230 + 1), sampling=sampling),
        )
        for k in range(60)
    ]
    got = answered(made, jobs)
    assert all((answer.error, answer.output_tokens) == (None, 12) for answer in got.values())


def test_micro_batches_smaller_than_a_step_leave_the_choice_to_the_host(tiny_model: Path) -> None:
    made = msgspec.structs.replace(on("device", config(tiny_model, slots=8)), ubatch_tokens=4)
    got = answered(made, [chat(k, PROMPTS[k]) for k in range(8)])
    assert all((answer.error, answer.output_tokens > 0) == (None, True) for answer in got.values())


def test_what_a_graph_gives_changes_only_when_nobody_has_wanted_it_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[object] = []
    kept: int = backend_sampling.LISTS_KEPT
    monkeypatch.setattr(lib, "llama_set_sampler", lambda *_: planned.append(None))
    given = backend_sampling.BackendSampling(4, 4, 49_152, np.array([2]))

    def want(times: int, wanted: bool, temperature: float = 0.0) -> float:
        for _ in range(times):
            given.want_lists(None, wanted, temperature)
        lists: float = given.lists
        return lists

    assert want(1, True, 0.7) == 0.7, "nobody has had anything yet"
    assert want(kept - 1, True, 1.0) == 0.7
    assert want(1, True, 0.7) == 0.7
    assert want(kept - 1, True, 1.0) == 0.7
    assert want(1, True, 1.0) == 1.0
    assert want(kept + 1, True) == 1.0, "with a filter any will do"
    assert want(kept - 1, False) == 1.0
    assert want(1, False) == 0.0
    assert want(1, True) == 1.0
    assert len(planned) == 4


BROKEN = """
import sys
import numpy as np
from workers.backend_sampling import BackendSampling
from workers.llama import LlamaModel
from workers.llama_backend import start_backend
from workers.protocol import EngineConfig
from scheduling.errors import EngineError

start_backend()
made = EngineConfig(model=sys.argv[1], slots=4, ctx_tokens=256, batch_tokens=64, ubatch_tokens=64, sample_on="device")
model = LlamaModel(made)
context = model.context(made, 4, 1, whole_passes=True)
# Of an unequal number of tokens for each sequence llama.cpp makes several pieces.
seq = np.repeat([0, 1, 2], [1, 3, 5])
for name, values in (("token", 5), ("seq", seq), ("pos", np.concatenate([np.arange(n) for n in (1, 3, 5)]))):
    getattr(context, name)[:9] = values
context.wanted[:9] = [1, 0, 0, 1, 0, 0, 0, 0, 1]
assert context.decode(9) == 0
if sys.argv[2] == "cut":
    try:
        context.best(3)
    except EngineError as error:
        print(error)
else:
    context.clear()
    context.wanted[:3] = 1
    context.seq[:3], context.pos[:3] = [0, 1, 2], 0
    assert context.decode(3) == 0
    context._sampling.best = lambda *_: np.array([3, 3, 3], np.int32)
    try:
        context.best(3)
    except EngineError as error:
        print(error)
"""


@pytest.mark.parametrize(("case", "expected"), [("cut", "rows of logits in one piece"), ("wrong", "does not find")])
def test_what_is_not_what_was_expected_ends_the_engine_and_says_what_to_do(
    tiny_model: Path, case: str, expected: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BROKEN, str(tiny_model), case], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert expected in done.stdout
    assert "--no-gpu-sampling" in done.stdout


UNNAMED = """
import sys
import numpy as np
import workers.backend_sampling
from workers.llama import LlamaModel
from workers.llama_backend import start_backend
from workers.protocol import EngineConfig

workers.backend_sampling.LOGITS = b"a name that this model's logits have not, as plamo3's have none"
start_backend()
made = EngineConfig(model=sys.argv[1], slots=2, ctx_tokens=256, batch_tokens=64, ubatch_tokens=64, sample_on="device")
context = LlamaModel(made).context(made, 2, 1, whole_passes=True)
for rows in (1, 2):
    context.token[:rows], context.seq[:rows], context.pos[:rows], context.wanted[:rows] = 5, np.arange(rows), rows, 1
    assert context.decode(rows) == 0
    best = context.best(rows)
    assert (best == context.logits(rows).argmax(axis=1)).all()
print("right")
"""


def test_logits_without_a_name_are_found(tiny_model: Path) -> None:
    done = subprocess.run([sys.executable, "-c", UNNAMED, str(tiny_model)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr


NEVER_SAID = """
import ctypes, sys
import llama_cpp.llama_cpp as lib
import numpy as np
from workers import backend_sampling
from workers.llama import LlamaModel
from workers.llama_backend import start_backend
from workers.protocol import EngineConfig
from workers.sampling import NOT_FINITE

start_backend()
made = EngineConfig(model=sys.argv[1], slots=4, ctx_tokens=256, batch_tokens=64, ubatch_tokens=64, sample_on="device")
context = LlamaModel(made).context(made, 4, 1, whole_passes=True)
for name, values in (("token", 5), ("seq", range(4)), ("pos", 0), ("wanted", 1)):
    getattr(context, name)[:4] = values
assert context.decode(4) == 0
said = context.best(4)
sums = np.ctypeslib.as_array(lib.llama_get_sampled_probs_ith(context._context, 0), (4,))
sums[:] = [sums[0], -np.inf, np.inf, np.nan]
assert context.best(4).tolist() == [*said[:3].tolist(), NOT_FINITE]
infinite = np.array([np.inf], np.float32)
put = backend_sampling._function("ggml_backend_tensor_set", None, *[ctypes.c_void_p] * 2, *[ctypes.c_size_t] * 2)
place = (2 * context.vocab_tokens + int(said[2])) * 4
put(context._sampling._nodes.logits, infinite.ctypes.data, place, 4)
assert context.best(4).tolist() == [*said[:2].tolist(), NOT_FINITE, NOT_FINITE]
print("right")
"""


def test_only_rows_whose_largest_logit_is_not_finite_are_damaged(tiny_model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NEVER_SAID, str(tiny_model)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stderr
