"""`llmpi bench dispatch`: what everything but the engine costs, against mpi4py's own task pool in the same run.

Ours: a file of prompts goes through the real source, control plane, transport and durable record to null engines inside
the ranks. The peer: MPICommExecutor hands the same prompts out one by one and gets answers of the same size back; it
writes nothing. Both are timed on rank 0 from the first request read to the last answer (ours: durable).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from coordinator.callbacks import Callbacks
from coordinator.config import JobConfig
from coordinator.launch import detect
from coordinator.mpi import World
from coordinator.ranks import open_world, serve_rank
from coordinator.session import Session
from coordinator.setup import prepare
from coordinator.source import FileSource
from scheduling.errors import EXIT_OK, ConfigError
from storage.files import OsDisk
from storage.record import RecordWriter
from storage.recovery import scan
from storage.rundir import RunDir


def run_bench_dispatch(
    *,
    requests: int,
    prompt_bytes: int,
    answer_bytes: int,
    slots: int,
    peer_requests: int,
    output: Path | None,
    schedule: str,
    fanout: int,
    as_json: bool,
) -> int:
    """Run both on all ranks; rank 0 prints the figures."""
    launch = detect(os.environ)
    if launch.launcher == "none":
        raise ConfigError(
            "bench dispatch measures messages between ranks: start it as `mpirun -n 3 llmpi bench dispatch`"
        )
    # The peer's manager thread asks for this much; ours would need less.
    world = open_world(launch, "serialized", fanout)
    if world.size < 2:
        raise ConfigError("bench dispatch needs at least 2 ranks: one gives, the others answer")
    config = JobConfig(
        model="null", engine="null", schedule=schedule, slots=slots, fanout=fanout, null_answer_bytes=answer_bytes,
        coordinator_works=False, device="cpu",
    )  # fmt: skip
    setup = prepare(config)
    if world.rank > 0:
        serve_rank(setup, world, None)
        if peer_requests:
            run_peer(world, [], answer_bytes)
        return EXIT_OK
    with tempfile.TemporaryDirectory(prefix="llmpi-bench-") as scratch:
        prompts = Path(scratch) / "prompts.jsonl"
        _say(f"writing {requests:,} prompts of {prompt_bytes:,} bytes")
        write_prompts(prompts, requests, prompt_bytes)
        _say("sending them through null engines")
        found = run_ours(Session(setup, world), config, prompts, output or Path(scratch) / "run")
        found |= {
            "run_dir": output and str(output),
            "requests": requests,
            "ranks": world.size,
            "leaders": len(set(world.leaders.values())),
            "prompt_bytes": prompt_bytes,
        }
        found |= {"answer_bytes": answer_bytes, "rank0_messages": world.messages}
        if peer_requests:
            lines = prompts.read_bytes().splitlines()[:peer_requests]
            _say(f"{found['requests_per_s']:,.0f} requests/s; now {len(lines):,} of them through the peer")
            peer_s = run_peer(world, lines, answer_bytes)
            found["peer"] = "mpi4py.futures.MPICommExecutor, one by one"
            found["peer_requests_per_s"] = len(lines) / peer_s
            found["ratio"] = found["requests_per_s"] / found["peer_requests_per_s"]
    _print(found, as_json)
    return EXIT_OK


def write_prompts(path: Path, requests: int, prompt_bytes: int) -> None:
    """A file of chat requests, `prompt_bytes` of text each, all different."""
    filler = "The quick brown fox jumps over the lazy dog. " * (prompt_bytes // 45 + 1)
    with path.open("w", encoding="utf-8") as file:
        for k in range(requests):
            text = f"{k:09d} {filler}"[:prompt_bytes]
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": 50, "temperature": 0}
            line = {"custom_id": f"p{k}", "method": "POST", "url": "/v1/chat/completions", "body": body}
            file.write(json.dumps(line) + "\n")


def run_ours(session: Session, config: JobConfig, prompts: Path, run_dir: Path) -> dict[str, Any]:
    """The real way of a request, with null engines. Times in seconds."""
    began = time.monotonic()
    try:
        source = FileSource(prompts, format="jsonl", defaults=config.sampling)
        checked = time.monotonic()
        with RunDir.create_or_resume(run_dir, {"bench": "dispatch", "at": time.time()}) as run:
            session.start()
            record = RecordWriter(
                OsDisk(), run.record_path, time.monotonic, config.commit_interval_s, config.commit_bytes
            )
            coordinator = session.begin(source, record, Callbacks())
            started, started_cpu = time.monotonic(), time.process_time()
            session.run()
            took_s, cpu_s = time.monotonic() - started, time.process_time() - started_cpu
            record.close()
            gathered = session.collect()
        done = scan(OsDisk(), run.record_path).ok
    except BaseException as error:
        session.refuse(str(error))
        raise
    finally:
        session.close()
    assert gathered is not None
    counted = gathered.reduced.sums.requests
    if done != source.total or counted != done:
        raise ConfigError(f"{source.total} requests were sent, {done} are recorded, {counted} counted")
    return {
        "requests_per_s": done / took_s,
        "run_s": took_s,
        "precheck_s": checked - began,
        "rank0_cpu_us_per_request": 1e6 * cpu_s / done,
        "fsyncs": record.fsyncs,
        "recalls": coordinator.plane.totals.recalls,
        "rank0_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def run_peer(world: World, prompts: list[bytes], answer_bytes: int) -> float:
    """Seconds that MPICommExecutor takes to hand out `prompts` one by one and get answers back."""
    from mpi4py.futures import MPICommExecutor

    began = time.monotonic()
    executor: Any
    with MPICommExecutor(world.MPI.COMM_WORLD, root=0) as executor:
        if executor is not None:
            began = time.monotonic()
            pending = [executor.submit(_answer, prompt, answer_bytes) for prompt in prompts]
            received = sum(len(future.result()) for future in pending)
            if received != answer_bytes * len(prompts):
                raise ConfigError("the peer returned other bytes than were asked for")
    return time.monotonic() - began


def _answer(prompt: bytes, size: int) -> bytes:
    return b"x" * size


def _say(what: str) -> None:
    print(f"llmpi: {what}", file=sys.stderr, flush=True)


def _print(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        from coordinator.values import print_json

        print_json(found)
        return
    print(f"{found['requests_per_s']:,.0f} requests/s, durable ({found['fsyncs']} commits)", file=sys.stdout)
    if "ratio" in found:
        peer = f"{found['peer_requests_per_s']:,.0f} requests/s by {found['peer']}"
        print(f"{peer}; ours is {found['ratio']:.1f} times as fast")
    if found["run_dir"]:
        print(f"run directory: {found['run_dir']}")
