"""A run directory made with the real writers: record, segments, run.json, and metrics.h5 from these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coordinator.config import JobConfig
from coordinator.rundata import make_metrics
from scheduling.histogram import LogHistogram
from scheduling.recordline import encode_failure, encode_result
from scheduling.requests import Request
from scheduling.tables import COPY, RANK, TELEMETRY
from storage.files import OsDisk
from storage.recovery import RECORD_NAME
from storage.rundir import SEGMENTS_NAME, RunDir
from storage.segments import Segment, SegmentWriter
from storage.summary import Rows

NASTY = '<script>alert(1)</script> & "x" \x00 \u202e ü'
"""What a request or a path may hold."""


def telemetry(count: int, rank: int, *, gpu: bool = True) -> Rows:
    """One sample a second of a GPU that works at 80 to 100 %, 300 W."""
    table = np.zeros(count, TELEMETRY)
    table["t_s"], table["rank"], table["gpu"] = np.arange(count), rank, rank - 1 if gpu else -1
    table["utilization"] = 90 + 10 * np.sin(np.arange(count) + rank) if gpu else np.nan
    table["memory_used_bytes"] = (20 + rank) << 30 if gpu else -1
    table["power_w"], table["energy_j"] = (300.0, 1e6 + 300.0 * np.arange(count)) if gpu else (np.nan, np.nan)
    table["cpu_percent"], table["rss_bytes"] = 120.0, 3 << 30
    return table


def make_run(
    path: Path, requests: int = 120, *, failed: int = 0, ranks: int = 2, gpu: bool = True, ended: bool = True,
    config: dict[str, Any] | None = None, seed: int = 0, slowness: float = 1.0,
    copies: Sequence[tuple[int, int, float, int]] = (),
) -> Path:  # fmt: skip
    """`requests` answers and failures on `ranks` ranks. Not `ended`: killed, so that only the record is there.

    `copies` of stragglers: at which rank, of what ran on which, when it was made, and its `won` in the table.
    """
    random = np.random.default_rng(seed)
    job = JobConfig(model="model.gguf", **(config or {}))
    details = {
        "command": ["/bin/llmpi", "batch", "-o", NASTY], "model": NASTY, "seed": 5, "versions": {"llmpi": "0.1.0"},
        "config": msgspec.to_builtins(job), "input_identity": {"sha256": "abc"},
    }  # fmt: skip
    facts: dict[str, Any] = {
        "ranks": ranks + 1, "launcher": "openmpi", "mpi": "Open MPI 5",
        "workers": [{"rank": k + 1, "host": f"node{k}", "device": "GPU", "gpus": [f"GPU-{k}"]} for k in range(ranks)],
    }  # fmt: skip
    with RunDir.create_or_resume(path, {"model": "sampled-sha256:0123"}, details, facts) as run:
        run.set_total(requests + (0 if ended else 10))
        lines, rows, itl = [], np.zeros(ranks, RANK), LogHistogram()
        rows["rank"] = np.arange(1, ranks + 1)
        rows["host"], rows["device"] = [f"node{k}".encode() for k in range(ranks)], b"GPU <0>"
        at = np.zeros(ranks)
        for index in range(requests):
            place = index % ranks
            e2e_s = slowness * float(random.lognormal(-1, 0.5))
            at[place] += e2e_s / 2  # two at once
            thief = 0 if index > 0.8 * requests and place == 1 and ranks > 1 else None
            when = {"end_s": round(float(at[place]) + 2.0, 4), "stolen_from": None if thief is None else 1}
            if index < failed:
                lines.append(
                    encode_failure(NASTY, index, 1, place + 1, 0, "test", NASTY, 10, 0.01, e2e_s, **when)  # type: ignore[arg-type]
                )
            else:
                asked = Request(custom_id=NASTY, kind="completion", prompt="x")
                lines.append(
                    encode_result(
                        asked, index, 1, place + 1, 0, [("text", "stop", 20)], 10, 20, 0.1 * e2e_s, 0.3 * e2e_s, e2e_s,
                        1, "m", **when,  # type: ignore[arg-type]
                    )
                )  # fmt: skip
                itl.add(np.full(19, e2e_s / 30))
                rows["output_tokens"][place] += 20
            rows["requests"][place] += 1
        (path / RECORD_NAME).write_bytes(b"".join(lines))
        wall_s = float(at.max(initial=0.0)) + 2.0
        rows["wall_s"], rows["busy_s"] = wall_s, 0.75 * wall_s
        rows["stolen_in"] = [0, 1] + [0] * (ranks - 2) if ranks > 1 else 0
        if ended:
            writer = SegmentWriter(OsDisk(), path / SEGMENTS_NAME, run.session)
            samples = [telemetry(int(wall_s) + 2, rank, gpu=gpu) for rank in range(1, ranks + 1)]
            copied = [
                (k, 2, 0, rank, source, at_s, at_s + 1.0, won) for k, (rank, source, at_s, won) in enumerate(copies)
            ]
            segments = [Segment("ranks", rows, {}), Segment("itl", itl.counts, {})]
            segments.append(Segment("copies", np.array(copied, COPY), {}))
            writer.write([*segments, *(Segment("telemetry", one, {}) for one in samples)])
            writer.close()
            run.add_session_facts(
                {
                    "wall_s": wall_s, "session": 0, "requests": requests, "stolen": 1, "copies": len(copies),
                    "copies_won": sum(won == 1 for *_, won in copies), "wasted_tokens": 7,
                    "prompt_tokens": 10 * requests,
                    "output_tokens": 20 * (requests - failed), "engine": job.engine, "outcome": "done",
                }
            )  # fmt: skip
            make_metrics(path)
            run.mark_complete({"ok": requests - failed, "failed": failed})
    return path
