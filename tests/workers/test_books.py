"""When a step is told: at once, or while the device computes the next one."""

from __future__ import annotations

import pytest

from tests.workers.engine_fakes import FakeDecoder, job
from tests.workers.test_stepper import Rig
from workers.shape import Shape

Told = list[str]


def told(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Told:
    """What happens from now on: "pass" as the device is given one, "wait" for what it says, "told" as the meter hears
    of a step."""
    found: Told = []

    def noting(name: str, of: object, method: str) -> None:
        really = getattr(of, method)

        def noted(*arguments: object, **named: object) -> object:
            found.append(name)
            return really(*arguments, **named)

        monkeypatch.setattr(of, method, noted)

    noting("pass", rig.decoder, "decode")
    noting("wait", rig.decoder, "best")
    noting("told", rig.meter, "step")
    return found


# Two texts at once, and one that is alone.
@pytest.mark.parametrize("requests", [1, 2])
@pytest.mark.parametrize("steady", [False, True])
def test_a_step_is_told_while_the_device_computes_the_next_one(
    requests: int, steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeDecoder, "asynchronous", True)
    rig = Rig(shape=Shape(steady=steady))
    rig.submit(*(job(key, max_tokens=3) for key in range(requests)))
    found = told(rig, monkeypatch)
    rig.run()
    assert found == ["pass", "wait", "pass", "told", "wait", "pass", "told", "wait", "told"]


@pytest.mark.parametrize("requests", [1, 2])
@pytest.mark.parametrize("steady", [False, True])
def test_it_is_told_at_once_where_there_is_no_such_time(
    requests: int, steady: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With some layers on a GPU, too, whose batches have its shape: a step may take many seconds there."""
    rig = Rig(shape=Shape(steady=steady))
    rig.submit(*(job(key, max_tokens=3) for key in range(requests)))
    found = told(rig, monkeypatch)
    rig.run()
    assert found == ["pass", "wait", "told"] * 3


def test_what_a_refused_batch_took_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDecoder, "asynchronous", True)
    rig = Rig()
    rig.submit(job(1, max_tokens=3))
    rig.decoder.codes = [0, 1]
    found = told(rig, monkeypatch)
    rig.run()
    assert found == ["pass", "wait", "pass", "told", "told"]
