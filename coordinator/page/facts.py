"""The last parts of a report's page: what failed, what was run, and how to repeat it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from coordinator.config import JobConfig
from coordinator.page.parts import named, table_of, text_of
from coordinator.report import state_text
from coordinator.runview import RunView


def failures(runs: Sequence[RunView], reasons: Sequence[Sequence[tuple[int, str, str]]]) -> list[str]:
    """Why requests failed: `reasons` of each run as (how many, custom_id of one, message)."""
    out = []
    for run, of_run in zip(runs, reasons, strict=True):
        if not of_run:
            continue
        out.append(f"<h2>{text_of(named(runs, run))}{run.data['failed']:,} failed</h2>")
        rows = [(f"{count:,}", custom_id, message) for count, custom_id, message in of_run]
        out.append(table_of(("requests", "one of them", "why"), rows, left=3))
        others = run.data["failed"] - sum(count for count, _, _ in of_run)
        if others > 0:
            out.append(f"<p>{others:,} failed for other reasons: see error in results.jsonl.</p>")
    return out


def config_of(run: RunView) -> dict[str, Any]:
    config = run.state.get("details", {}).get("config")
    return config if isinstance(config, dict) else {}


def about(runs: Sequence[RunView]) -> list[str]:
    facts = [_facts(run) for run in runs]
    names = list(dict.fromkeys(name for of_run in facts for name in of_run))
    rows = [(name, *(of_run.get(name, "") for of_run in facts)) for name in names]
    head = ("", *(run.name for run in runs))
    out = ["<h2>What was run</h2>", table_of(head, rows, left=len(head)).replace("<table>", '<table class="facts">')]
    out.append("<h2>How to repeat it</h2>")
    for run in runs:
        out.append(f"<pre>{text_of(_command(run))}</pre>")
    out.append(
        "<p>With another run directory for -o: the same one goes on where it ended, or says that it is complete. All "
        "figures are in metrics.h5, all answers in results.jsonl.</p>"
    )
    return out


def _facts(run: RunView) -> dict[str, str]:
    details, identity = run.state.get("details", {}), run.state.get("identity", {})
    session = run.state["sessions"][-1] if run.state.get("sessions") else {}
    workers = session.get("workers") or []
    said = {
        "state": state_text(run.status.complete, run.status.running, run.data["failed"]),
        "run directory": str(run.path),
        # A model of the store by the name it was given, not by its blob's path: the digest is in the next line.
        "model": config_of(run).get("model") if details.get("model_digest") else details.get("model"),
        "model digest": details.get("model_digest"),
        "model fingerprint": identity.get("model"),
        "input": details.get("input"),
        "input SHA-256": (details.get("input_identity") or {}).get("sha256"),
        "requests": "not counted" if run.status.total is None else f"{run.status.total:,}",
        "seed": details.get("seed"),
        "options that differ from the defaults": _changed(config_of(run)),
        "started": session.get("started_at"),
        "jobs": len(run.state.get("sessions", [])),
        "ranks": session.get("ranks"),
        "hosts": _counted([worker.get("host") for worker in workers]),
        "devices": _counted([worker.get("device") for worker in workers]),
        "GPUs": ", ".join(dict.fromkeys(uuid for worker in workers for uuid in worker.get("gpus") or [])),
        "launcher": session.get("launcher"),
        "MPI": session.get("mpi"),
        "Slurm job": session.get("slurm_job"),
        "versions": ", ".join(f"{name} {version}" for name, version in (details.get("versions") or {}).items()),
    }
    return {name: str(value) for name, value in said.items() if value not in (None, "")}


def _changed(config: dict[str, Any]) -> str:
    """Options that are not at their defaults; those of sampling one by one."""
    defaults = JobConfig(model="")
    pairs = [(name, value, getattr(defaults, name)) for name, value in config.items() if hasattr(defaults, name)]
    sampling = config.get("sampling") or {}
    pairs += [(name, value, getattr(defaults.sampling, name, None)) for name, value in sampling.items()]
    told = [
        f"{name} = {_plain(value)}" for name, value, default in pairs
        if name not in ("model", "sampling") and value != default and (value or default)
    ]  # fmt: skip
    return ", ".join(told) or "none"


def _counted(texts: Sequence[str | None]) -> str:
    counts: dict[str, int] = {}
    for text in texts:
        counts[str(text)] = counts.get(str(text), 0) + 1
    return ", ".join(text if count == 1 else f"{count} × {text}" for text, count in counts.items())


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_plain(item)}" for name, item in value.items()) + "}"
    return f"{value}"


def _command(run: RunView) -> str:
    """The command line that started the run, behind the launcher that was there."""
    words = run.state.get("details", {}).get("command") or []
    session = run.state["sessions"][-1] if run.state.get("sessions") else {}
    start = {"openmpi": "mpirun -n", "mpich": "mpirun -n", "slurm": "srun -n"}.get(session.get("launcher", ""))
    ranks = session.get("ranks")
    launched = f"{start} {ranks} " if start and ranks else ""
    return f"{launched}llmpi {shlex.join(str(word) for word in words[1:])}"
