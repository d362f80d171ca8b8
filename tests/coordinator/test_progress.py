"""What a person sees while a job runs: plain lines now and then where nobody watches, and figures that are right."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from rich.text import Text

from coordinator import progress as progress_module
from coordinator.callbacks import Snapshot
from coordinator.durations import duration
from coordinator.progress import PLAIN_EVERY_S, ProgressView
from tests.coordinator.fakes import FakeClock


def snapshot(elapsed_s: float = 0.0, done: int = 0, **changes: int | None) -> Snapshot:
    fields: dict[str, int | None] = {
        "total": 100, "earlier": 0, "failed": 0, "running": 4, "queued": 2, "output_tokens": 10 * done,
        "made_tokens": 10 * done, "draining": False, "prompt_tokens": done, "workers_ready": 2, "workers": 2,
    }  # fmt: skip
    return Snapshot(elapsed_s=elapsed_s, done=done, **(fields | changes))  # type: ignore[arg-type]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    fake = FakeClock()

    class Time:
        monotonic = staticmethod(fake)

    monkeypatch.setattr(progress_module, "time", Time)
    return fake


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def test_where_nobody_watches_a_line_comes_every_half_minute(clock: FakeClock, stream: io.StringIO) -> None:
    view = ProgressView(stream)
    for second in range(100):
        view.show(snapshot(float(second), done=second))
        clock.pass_(1.0)
    lines = stream.getvalue().splitlines()
    assert 3 <= len(lines) <= 1 + 100 / PLAIN_EVERY_S
    assert "\x1b" not in stream.getvalue()


def test_a_line_says_how_far_how_fast_and_how_long_still(clock: FakeClock, stream: io.StringIO) -> None:
    view = ProgressView(stream)
    view.show(snapshot(0.0))
    clock.pass_(11.0)
    view.show(snapshot(5.0, done=20, failed=5))
    [line] = stream.getvalue().splitlines()
    for part in ("25/100", "5 failed", "4 running", "71 queued", "5.0 requests/s", "40 tokens/s", "ETA 15s"):
        assert part in line, line


def test_where_nothing_is_generated_the_tokens_that_are_read_count(clock: FakeClock, stream: io.StringIO) -> None:
    view = ProgressView(stream)
    view.show(snapshot(0.0, made_tokens=0, prompt_tokens=0))
    clock.pass_(11.0)
    view.show(snapshot(5.0, done=20, made_tokens=0, prompt_tokens=600))
    assert "120 tokens/s" in stream.getvalue()


def test_rates_are_of_the_last_seconds_the_eta_is_of_the_whole_run(clock: FakeClock, stream: io.StringIO) -> None:
    view = ProgressView(stream)
    for second in range(51):
        view.show(snapshot(float(second), done=second if second <= 40 else 40 + 5 * (second - 40)))
    clock.pass_(11.0)
    view.show(snapshot(50.0, done=90))
    assert "5.0 requests/s" in stream.getvalue()
    assert "ETA 6s" in stream.getvalue()


def test_resumed_requests_count_as_done_but_not_as_speed(clock: FakeClock, stream: io.StringIO) -> None:
    view = ProgressView(stream)
    view.show(snapshot(0.0, earlier=50))
    clock.pass_(11.0)
    view.show(snapshot(5.0, done=10, earlier=50))
    line = stream.getvalue()
    assert "60/100" in line
    assert "2.0 requests/s" in line
    assert "ETA 20s" in line


@pytest.mark.parametrize(
    ("done", "elapsed_s", "text"),
    [(0, 60.0, None), (1, 60.0, "1.0 requests/min"), (90, 360.0, "15.0 requests/min"), (4, 7200.0, "2.0 requests/h")],
)
def test_slow_requests_have_a_rate_too(
    clock: FakeClock, stream: io.StringIO, done: int, elapsed_s: float, text: str | None
) -> None:
    """Where none ends within ten seconds, the last ten seconds say that none ever does."""
    view = ProgressView(stream)
    view.show(snapshot(elapsed_s - 10.0, done=done, made_tokens=96))
    clock.pass_(11.0)
    view.show(snapshot(elapsed_s, done=done, made_tokens=100))
    line = stream.getvalue()
    assert "0.0 requests" not in line
    assert ("requests" in line) == (text is not None)
    assert text is None or text in line
    assert "0.4 tokens/s" in line


def test_unknown_total_has_no_eta(clock: FakeClock, stream: io.StringIO) -> None:
    view = ProgressView(stream)
    clock.pass_(11.0)
    view.show(snapshot(5.0, done=10, total=None))
    assert "10 done" in stream.getvalue()
    assert "ETA ?" in stream.getvalue()


def test_all_figures_fit_beside_a_bar_into_80_columns(
    clock: FakeClock, stream: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        progress_module, "console_for", lambda stream, live: Console(file=stream, width=80, force_terminal=True)
    )
    view = ProgressView(stream)
    view.show(snapshot(0.0))
    view.show(snapshot(100.0, done=1234, total=98765, running=128, queued=5000, made_tokens=2_000_000))
    view.close()
    line = Text.from_ansi(stream.getvalue()).plain.splitlines()[-1]
    assert "1234/98765 done · 128 run · 97403 wait · 12.3 req/s · 20000 tok/s · ETA" in line
    assert "━" in line


def test_the_last_line_of_a_run_that_was_stopped_promises_no_end(clock: FakeClock, stream: io.StringIO) -> None:
    view = ProgressView(stream)
    clock.pass_(11.0)
    view.show(snapshot(5.0, done=4))
    view.close(snapshot(5.0, done=4, running=0))
    first, last = stream.getvalue().splitlines()
    assert "ETA" in first
    assert "ETA" not in last
    assert "4/100 done" in last


def test_quiet_shows_warnings_only(clock: FakeClock, stream: io.StringIO) -> None:
    view = ProgressView(stream, quiet=True)
    clock.pass_(100.0)
    view.show(snapshot(100.0, done=1))
    view.note("resuming run x")
    view.warn("rank 1 [of 3] is lost")
    view.close(snapshot(100.0, done=1))
    assert stream.getvalue() == "rank 1 [of 3] is lost\n"


def test_notes_are_one_line_each_however_long(clock: FakeClock, stream: io.StringIO) -> None:
    ProgressView(stream).note("word " * 100)
    assert stream.getvalue().count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(None, "?"), (0.0, "0s"), (59.4, "59s"), (59.6, "1m00s"), (187.0, "3m07s"), (7_500.0, "2h05m"), (-3.0, "0s")],
)
def test_duration_for_people(seconds: float | None, text: str) -> None:
    assert duration(seconds) == text
