"""Rank 0 and many ranks on one machine: start, idling, and requests through null engines, without leaders and with.

usage: python benchmarks/ranks.py [--ranks 64,256] [--fanout 8] [--requests N] [--json]

Each row is a job under mpirun. Its ranks start, stand idle for `--idle` seconds, and answer the requests, which come
from a file and go through control plane, transport and durable record. Processor time and memory (PSS) are read from
/proc of all ranks, messages are counted where rank 0 gives them to MPI and gets them from it. Messages and processor
time of rank 0 are for 1,000 requests. The texts of all rows must be equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

LAUNCHED = "LLMPI_BENCH_LAUNCHED"
SETTLE_S = 15.0
"""Idle before it is measured: loops sleep longer and longer."""
COLUMNS = (
    ("ranks", "ranks", "{:d}"), ("fanout", "fanout", "{:d}"), ("start_s", "start s", "{:.1f}"),
    ("start_cpu_s", "CPU s", "{:.0f}"), ("idle_cores", "idle cores", "{:.2f}"),
    ("idle_rank0_cores", "of rank 0", "{:.3f}"), ("idle_messages_per_s", "idle msg/s", "{:.0f}"),
    ("requests_per_s", "requests/s", "{:,.0f}"), ("messages", "messages", "{:.1f}"),
    ("messages_per_s", "msg/s", "{:,.0f}"), ("rank0_cpu_ms", "CPU ms", "{:.1f}"),
    ("pss_mb", "MB a rank", "{:.1f}"), ("rank0_pss_mb", "of rank 0", "{:.1f}"),
)  # fmt: skip


# ---------------------------------------------------------------- a rank


def be_rank(options: argparse.Namespace) -> None:
    """One rank of a job."""
    from coordinator.config import JobConfig
    from coordinator.launch import detect
    from coordinator.ranks import open_world, serve_rank
    from coordinator.setup import prepare

    config = JobConfig(
        model="null", engine="null", slots=options.slots, device="cpu", coordinator_works=False, fanout=options.fanout
    )
    world = open_world(detect(os.environ), fanout=options.fanout)
    if world.rank > 0:
        serve_rank(prepare(config), world, None)
        return
    lead(options, prepare(config), world)


def lead(options: argparse.Namespace, setup: Any, world: Any) -> None:
    """Rank 0: measure, and print what was found as one line."""
    from coordinator.bench_dispatch import write_prompts
    from coordinator.callbacks import Callbacks
    from coordinator.session import Session
    from coordinator.source import FileSource
    from storage.files import OsDisk
    from storage.record import RecordWriter

    config = setup.config
    with tempfile.TemporaryDirectory(prefix="llmpi-ranks-") as folder:
        prompts, record_path = Path(folder) / "prompts.jsonl", Path(folder) / "results.jsonl"
        write_prompts(prompts, options.requests, 200)
        source = Held(FileSource(prompts, format="jsonl", defaults=config.sampling))
        session = Session(setup, world)
        session.start()
        record = RecordWriter(
            OsDisk(), record_path, time.monotonic, config.commit_interval_s, config.commit_bytes, lambda: None
        )
        coordinator = session.begin(source, record, Callbacks())
        session.run(lambda: len(coordinator.ready) < world.size - 1)
        found: dict[str, Any] = {"ranks": world.size, "fanout": options.fanout}
        pids = [os.getpid(), *session._pids.values()]
        found["start_s"] = time.time() - float(os.environ[LAUNCHED])
        found["start_cpu_s"] = sum(cpu_s(pid) for pid in pids)
        stand(session, SETTLE_S)
        before, messages, since = [cpu_s(pid) for pid in pids], world.messages, time.monotonic()
        stand(session, options.idle)
        took_s = time.monotonic() - since
        spent = [cpu_s(pid) - was for pid, was in zip(pids, before, strict=True)]
        found["idle_cores"], found["idle_rank0_cores"] = sum(spent) / took_s, spent[0] / took_s
        found["idle_messages_per_s"] = (world.messages - messages) / took_s
        source.open = True
        messages, since, own = world.messages, time.monotonic(), time.process_time()
        session.run()
        took_s = time.monotonic() - since
        found["requests_per_s"] = options.requests / took_s
        found["messages"] = 1000 * (world.messages - messages) / options.requests
        found["messages_per_s"] = (world.messages - messages) / took_s
        found["rank0_cpu_ms"] = 1e6 * (time.process_time() - own) / options.requests
        sizes = [pss_bytes(pid) for pid in pids]
        found["pss_mb"], found["rank0_pss_mb"] = sum(sizes) / len(sizes) / 1e6, sizes[0] / 1e6
        record.close()
        assert session.collect() is not None
        session.close()
        lines = [json.loads(line) for line in record_path.read_bytes().splitlines()]
        texts = sorted((x["custom_id"], x["response"]["body"]["choices"][0]["message"]["content"]) for x in lines)
        assert len({name for name, _ in texts}) == options.requests == len(texts)
        found["texts"] = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    print(json.dumps(found), flush=True)


class Held:
    """A source that gives nothing before it is `open`."""

    def __init__(self, source: Any) -> None:
        self._source = source
        self.open = False

    def read(self, max_requests: int, max_bytes: int) -> list[Any]:
        return self._source.read(max_requests, max_bytes) if self.open else []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def stand(session: Any, seconds: float) -> None:
    until = time.monotonic() + seconds
    session.run(lambda: time.monotonic() < until)


def cpu_s(pid: int) -> float:
    """Processor time of all threads of a process."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def pss_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


# ---------------------------------------------------------------- all jobs


def run_job(options: argparse.Namespace, ranks: int, fanout: int) -> dict[str, Any]:
    beside = Path(sys.executable).with_name("mpirun")
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        sys.exit("no mpirun beside this Python or on the PATH")
    command = [mpirun, "--oversubscribe", "--bind-to", "none", "-n", str(ranks), sys.executable, __file__, "--rank"]
    command += ["--fanout", str(fanout), "--requests", str(options.requests), "--slots", str(options.slots)]
    command += ["--idle", str(options.idle)]
    environ = os.environ | {LAUNCHED: str(time.time())}
    done = subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", default="64,256", help="ranks of the jobs (default: 64,256)")
    parser.add_argument("--fanout", type=int, default=8, help="of the jobs with leaders (default: 8)")
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--slots", type=int, default=16, help="of each null engine (default: 16)")
    parser.add_argument("--idle", type=float, default=20.0, help="seconds of idling that are measured (default: 20)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        be_rank(options)
        return
    rows = []
    for ranks in map(int, options.ranks.split(",")):
        for fanout in (ranks, options.fanout):
            rows.append(run_job(options, ranks, fanout))
            print(json.dumps(rows[-1]), file=sys.stderr)
    assert len({row["texts"] for row in rows}) == 1, "the texts differ"
    if options.json:
        print(json.dumps(rows))
        return
    print("| " + " | ".join(title for _, title, _ in COLUMNS) + " |")
    print("|" + "---|" * len(COLUMNS))
    for row in rows:
        print("| " + " | ".join(form.format(row[name]) for name, _, form in COLUMNS) + " |")
    print(f"texts of {options.requests:,} requests: equal in all rows")


if __name__ == "__main__":
    main()
