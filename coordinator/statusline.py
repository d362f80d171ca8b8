"""How far a run is, as a line and as data."""

from __future__ import annotations

from typing import Any

from storage.runstatus import Status


def status_data(found: Status) -> dict[str, Any]:
    """How far a run is, as plain data."""
    return {
        "run_dir": str(found.path), "ok": found.ok, "failed": found.failed, "done": found.done, "total": found.total,
        "complete": found.complete, "running": found.running, "sessions": found.sessions,
        "lost_bytes": found.lost_bytes, "exit_code": found.exit_code,
    }  # fmt: skip


def state_line(found: Status) -> str:
    """How far a run is, in a line."""
    total = "?" if found.total is None else str(found.total)
    state = (
        "complete" if found.complete else "running" if found.running else "not complete: the same command resumes it"
    )
    lost = f". {found.lost_bytes:,} bytes of answers that had been counted are gone from it" if found.lost_bytes else ""
    return f"{found.path}: {found.done} of {total} done ({found.ok} answered, {found.failed} failed), {state}{lost}"
