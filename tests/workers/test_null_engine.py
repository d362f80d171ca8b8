"""The null engine speaks the engine's protocol, and answers at once."""

from __future__ import annotations

from tests.workers.engine_fakes import job
from workers.null_engine import NullEngine
from workers.port import Engine
from workers.protocol import EngineLoaded, Frame, Returned, decode_from_engine, encode


def loaded_engine() -> NullEngine:
    engine = NullEngine(3, answer_bytes=20)
    [loaded] = engine.poll()
    assert isinstance(loaded, EngineLoaded)
    assert loaded.slots == 3
    return engine


def test_it_is_an_engine() -> None:
    engine: Engine = NullEngine(1)
    assert engine.alive
    assert engine.fileno() is None
    assert engine.exit_reason() == ""


def test_everything_submitted_is_answered_at_the_next_poll() -> None:
    engine = loaded_engine()
    engine.submit([job(4), job(9)])
    [frame] = engine.poll()
    assert isinstance(frame, Frame)
    assert [answer.key for answer in frame.finished] == [4, 9]
    assert all(len(answer.choices[0].text) == 20 and answer.error is None for answer in frame.finished)
    assert engine.poll() == []


def test_what_is_recalled_before_the_poll_is_not_answered() -> None:
    engine = loaded_engine()
    engine.submit([job(4), job(9)])
    engine.recall(7, [9, 10])
    returned, frame = engine.poll()
    assert returned == Returned(7, [9])
    assert isinstance(frame, Frame)
    assert [answer.key for answer in frame.finished] == [4]


def test_recall_of_what_is_answered_returns_nothing() -> None:
    engine = loaded_engine()
    engine.submit([job(4)])
    engine.poll()
    engine.recall(8, [4])
    assert engine.poll() == [Returned(8, [])]


def test_cancelled_requests_still_end_with_an_answer() -> None:
    engine = loaded_engine()
    engine.submit([job(4)])
    engine.cancel([4])
    [frame] = engine.poll()
    assert isinstance(frame, Frame)
    assert [answer.key for answer in frame.finished] == [4]


def test_closed_it_is_not_alive() -> None:
    engine = loaded_engine()
    engine.close(1.0)
    engine.close(1.0)
    assert not engine.alive
    assert engine.exit_reason()


def test_what_it_says_could_go_through_a_pipe() -> None:
    engine = NullEngine(2)
    engine.submit([job(1)])
    for message in engine.poll():
        assert decode_from_engine(encode(message)[4:]) == message
