"""Lines, rows and records that several tests start from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from scheduling.recordline import encode_failure, encode_result
from scheduling.requests import Request
from scheduling.tables import FINISH_REASONS, REQUEST
from storage.summary import Rows
from tests.storage.fake_disk import Content, FakeDisk

RUN = Path("/run")
PATH = RUN / "results.jsonl"
ASKED = Request(custom_id="id", kind="completion", prompt="x")


def ok_line(index: int, session: int = 0, text: str = "answer") -> bytes:
    return encode_result(ASKED, index, 1, 1, session, [(text, "stop", 3)], 5, 3, 0.1, 0.2, 0.4, 1, "m")


def failed_line(index: int, session: int = 0) -> bytes:
    return encode_failure("id", index, 1, 2, session, "test", "no")


def disk_with(content: bytes) -> FakeDisk:
    return FakeDisk(dirs={RUN}, files={PATH: Content(content, content)})


def rows(count: int, seed: int = 0, failed: int = 0) -> Rows:
    """`count` rows of lognormal latencies, the first `failed` of them failed and absurdly slow."""
    random = np.random.default_rng(seed)
    table = np.zeros(count, REQUEST)
    table["index"] = np.arange(count)
    table["prompt_tokens"] = 10
    table["cached_tokens"] = 4
    table["output_tokens"] = 5
    for name in ("queue_s", "ttft_s", "tpot_s", "e2e_s"):
        table[name] = random.lognormal(-1, 1, count)
    table["ok"] = 1
    table["finish_reason"] = FINISH_REASONS["stop"]
    table["ok"][:failed] = 0
    table["e2e_s"][:failed] = 1e4
    table["ttft_s"][:failed] = np.nan
    return table
