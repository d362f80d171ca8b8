"""llama-server as a peer: the best of a grid of its settings, at a given number of requests at once.

usage: python benchmarks/llama_server.py MODEL --peers DIR [--at-once 128] [--requests N] [--prompt-tokens N]
           [--output-tokens N] [--threads 1,4,8,16] [--ubatch 512,2048] [--gpu-layers N] [--repeats N]
           [--finalists N] [--json]

Each setting gets a server of its own on a free port of the loopback interface. The client keeps `--at-once` requests
open: a thread and a connection for each, prompts as token ids, greedy, no end of text, nothing streamed, no prompt
reused. With --finalists N all settings first answer as many requests as are open at once, with SHORT_TOKENS of output,
and only the N fastest do the whole work. Tokens are counted from what the server reports. How little the client limits
it is shown by two figures: its processor time over wall time, and what the same client gets from a server that answers
at once.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np

PROGRAM = "llama-server"
READY_S = 300.0
ANSWER_S = 600.0
WARM_TOKENS, SHORT_TOKENS = 8, 32
"""Of output, of the requests that warm a server up, and of those that choose the finalists."""


@dataclass(frozen=True)
class Setting:
    """One point of the grid."""

    slots: int
    threads: int
    ubatch: int
    backend_sampling: bool

    def options(self) -> list[str]:
        flags = ["-np", str(self.slots), "-t", str(self.threads), "-ub", str(self.ubatch)]
        return flags + (["--backend-sampling"] if self.backend_sampling else [])


@dataclass(frozen=True)
class Work:
    """What is asked in one repeat. Lengths in tokens."""

    requests: int
    at_once: int
    prompt_tokens: int
    output_tokens: int
    vocab_tokens: int

    def bodies(self, repeat: int) -> list[bytes]:
        draw = np.random.default_rng(repeat)
        prompts = draw.integers(0, self.vocab_tokens, (self.requests, self.prompt_tokens)).tolist()
        fixed = {
            "n_predict": self.output_tokens, "temperature": 0.0, "ignore_eos": True, "cache_prompt": False,
            "response_fields": ["tokens_predicted", "tokens_evaluated"],
        }  # fmt: skip
        return [json.dumps({"prompt": prompt, **fixed}).encode() for prompt in prompts]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def server(program: Path, model: str, setting: Setting, work: Work, gpu_layers: int) -> Iterator[int]:
    """A running server. Yields its port."""
    port = free_port()
    # As many cells for each slot as one request can need, rounded as llama.cpp does.
    cells = -(-(work.prompt_tokens + work.output_tokens) // 256) * 256
    command = [
        str(program), "-m", model, "--port", str(port), "-c", str(cells * setting.slots), "-b", "2048", "-ngl",
        str(gpu_layers), "--no-webui", "--no-kv-unified", "--cache-ram", "0", *setting.options(),
    ]  # fmt: skip
    log = Path(os.environ.get("TMPDIR", "/tmp")) / f"llama-server-{port}.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL)
    try:
        wait_until_ready(process, port, log)
        yield port
    finally:
        process.kill()
        process.wait()
        log.unlink()


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise SystemExit(f"{PROGRAM} ended with {process.returncode}:\n{said}")
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        time.sleep(0.2)
    raise SystemExit(f"{PROGRAM} was not ready within {READY_S:g} s")


def ask_all(port: int, bodies: list[bytes], at_once: int) -> tuple[float, float, int]:
    """Ask for all of `bodies`. Returns seconds of wall time, seconds of processor time of this client, and tokens."""
    here = threading.local()

    def ask(body: bytes) -> int:
        connection = getattr(here, "connection", None)
        if connection is None:
            connection = here.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_S)
        connection.request("POST", "/completion", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        said = answer.read()
        if answer.status != 200:
            raise SystemExit(f"{PROGRAM} answered {answer.status}: {said[:200].decode(errors='replace')}")
        found = json.loads(said)
        return int(found["tokens_predicted"]) + int(found["tokens_evaluated"])

    with ThreadPoolExecutor(at_once) as pool:
        began_s, busy_s = time.perf_counter(), time.process_time()
        tokens = sum(pool.map(ask, bodies))
        return time.perf_counter() - began_s, time.process_time() - busy_s, tokens


class AtOnce(BaseHTTPRequestHandler):
    """Answers every request at once, with the fields that the client reads."""

    protocol_version = "HTTP/1.1"
    # Head and body go out apart: the body would wait for the head's acknowledgement, 40 ms.
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        said = b'{"tokens_predicted": 1, "tokens_evaluated": 1}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def client_limit(work: Work) -> float:
    """Requests a second that the client gets out of a server that does nothing (in this process, too)."""
    stub = ThreadingHTTPServer(("127.0.0.1", 0), AtOnce)
    stub.daemon_threads = True
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    wall_s, _, _ = ask_all(stub.server_address[1], work.bodies(0), min(work.at_once, 32))
    stub.shutdown()
    return work.requests / wall_s


def measure(
    program: Path, model: str, setting: Setting, work: Work, gpu_layers: int, repeats: int
) -> dict[str, Any] | None:
    """Median tokens/s of one setting; None if the server cannot run it."""
    try:
        with server(program, model, setting, work, gpu_layers) as port:
            warm = replace(work, requests=work.at_once, output_tokens=WARM_TOKENS)
            ask_all(port, warm.bodies(1 << 20), work.at_once)
            runs = [ask_all(port, work.bodies(repeat), work.at_once) for repeat in range(repeats)]
    except SystemExit as error:
        print(f"{setting}: {error}", file=sys.stderr)
        return None
    speeds = [tokens / wall_s for wall_s, _, tokens in runs]
    return {
        **asdict(setting),
        "total_tokens_per_s": statistics.median(speeds),
        "total_tokens_per_s_min": min(speeds),
        "total_tokens_per_s_max": max(speeds),
        "requests_per_s": statistics.median(work.requests / wall_s for wall_s, _, _ in runs),
        "client_processor_share": statistics.median(busy_s / wall_s for wall_s, busy_s, _ in runs),
    }


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure llama-server at the best of a grid of settings.")
    parser.add_argument("model")
    parser.add_argument("--peers", type=Path, required=True, help="folder with llama-server")
    parser.add_argument("--at-once", type=int, default=128)
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--vocab-tokens", type=int, default=32_000, help="prompts are random tokens under this")
    parser.add_argument("--threads", type=numbers, default=[1, 4, 8, 16])
    parser.add_argument("--ubatch", type=numbers, default=[512, 2048])
    parser.add_argument("--backend-sampling", type=numbers, default=[0, 1])
    parser.add_argument("--gpu-layers", type=int, default=999)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--finalists", type=int, default=0, help="settings that do the whole work; 0: all")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    work = Work(
        chosen.requests, chosen.at_once, chosen.prompt_tokens, chosen.output_tokens, chosen.vocab_tokens
    )  # fmt: skip
    limit = client_limit(work)
    program = chosen.peers / PROGRAM

    def tried(settings: Iterable[Setting], work: Work, repeats: int) -> list[dict[str, Any]]:
        """What each gives that can run, best first."""
        found = []
        for setting in settings:
            one = measure(program, chosen.model, setting, work, chosen.gpu_layers, repeats)
            if one is None:
                continue
            found.append(one)
            print(
                f"threads {setting.threads:2} ubatch {setting.ubatch:4} backend sampling {setting.backend_sampling:d} "
                f"output {work.output_tokens:3}: {one['total_tokens_per_s']:9,.0f} tokens/s, "
                f"{one['requests_per_s']:7.1f} requests/s, client {one['client_processor_share']:.0%} of a core",
                file=sys.stderr,
            )
        return sorted(found, key=lambda one: -one["total_tokens_per_s"])

    settings: list[Setting] = [
        Setting(chosen.at_once, threads, ubatch, bool(sampling))
        for threads, ubatch, sampling in itertools.product(chosen.threads, chosen.ubatch, chosen.backend_sampling)
    ]
    screened: list[dict[str, Any]] = []
    if 0 < chosen.finalists < len(settings):
        short = replace(work, requests=work.at_once, output_tokens=SHORT_TOKENS)
        screened = tried(settings, short, 1)
        names = Setting.__dataclass_fields__
        settings = [Setting(**{name: one[name] for name in names}) for one in screened[: chosen.finalists]]
    found = tried(settings, work, chosen.repeats)
    if not found:
        raise SystemExit(f"{PROGRAM} ran with none of the settings")
    best = found[0]
    if chosen.json:
        grid = {"grid": found, "screened": screened}
        print(json.dumps({"best": best, **grid, "client_requests_per_s_max": limit, "work": asdict(work)}))
    else:
        print(f"best: {best}\nthe client alone could ask {limit:,.0f} requests/s")


if __name__ == "__main__":
    main()
