"""A clock that is set, or that jumps, moves no duration: the product measures with monotonic clocks."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("coordinator", "scheduling", "storage", "workers")
WALL = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today")}

DATES = {
    "coordinator/bench_dispatch.py": "names a run",
    "coordinator/setup.py": "`created` of an answer",
    "coordinator/surroundings.py": "the clock of dates, which tests replace",
    "storage/blobs.py": "age of files that were left behind, against the times that the file system gave them",
    "storage/modelstore.py": "when a model was added",
    "storage/rundir.py": "when a session started",
    "storage/sources/http.py": "a server's Retry-After, which is a date",
    "workers/chat.py": "what a chat template asks for",
}
"""Files that read the wall's clock, and what for."""


def reads_the_wall(source: str) -> bool:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name | ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else node.value.attr
            if (owner, node.attr) in WALL:
                return True
        if isinstance(node, ast.ImportFrom) and node.module == "time" and {a.name for a in node.names} & {"time"}:
            return True
    return False


def test_the_walls_clock_is_read_for_dates_alone() -> None:
    files = [path for part in PARTS for path in (ROOT / part).rglob("*.py")] + [ROOT / "llmpi.py"]
    reading = {str(path.relative_to(ROOT)) for path in files if reads_the_wall(path.read_text(encoding="utf-8"))}
    assert reading == DATES.keys(), "durations need time.monotonic; a date has its reason in DATES"


def test_wall_clocks_are_seen() -> None:
    for source in ("time.time()", "f(clock=time.time)", "datetime.datetime.now()", "from time import time"):
        assert reads_the_wall(source)
    assert not reads_the_wall("time.monotonic(); from time import monotonic")
