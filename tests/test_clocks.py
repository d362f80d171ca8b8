"""Durations come from monotonic clocks: the time of day may jump, by NTP, by a person, by a suspended machine.

Where a module needs to know what time it is, for people or for other machines, it is named here with the reason.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch import ROOT

TIME_OF_DAY = {
    "time.time", "time.time_ns", "time.ctime", "time.localtime", "time.gmtime", "time.asctime", "time.strftime",
    "datetime.now", "datetime.utcnow", "datetime.today", "date.today", "datetime.datetime.now",
    "datetime.datetime.utcnow", "datetime.datetime.today", "datetime.date.today",
}  # fmt: skip
ALLOWED = {
    "coordinator/bench_dispatch.py": "when a benchmark was made",
    "coordinator/doctor/exchange.py": "hosts' clocks are compared",
    "coordinator/slurmjobs/submitting.py": "when somebody began to submit",
    "coordinator/doctor/probe_slurm.py": "Slurm's end of a job is told so",
    "coordinator/setup.py": "`created` of answers",
    "coordinator/study/directory.py": "when a study began",
    "coordinator/study/scaling.py": "when a cell began",
    "coordinator/surroundings.py": "`created` of answers",
    "coordinator/timekeeper.py": "Slurm's end of a job is told so, and read once",
    "storage/blobs.py": "the age of other processes' leftovers, a name that is new",
    "storage/modelstore.py": "when a model was added",
    "storage/rundir.py": "when a session began",
    "storage/sources/http.py": "a server's Retry-After may be a date",
    "workers/chat.py": "templates may ask what day it is",
}
FOLDERS = ("coordinator", "workers", "scheduling", "storage", "slurm", "hostfiles")


def times_of_day(source: str) -> Iterator[tuple[int, str]]:
    """Line and name of each use of a clock that may jump, whatever it was imported as."""
    tree = ast.parse(source)
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute | ast.Name):
            continue
        dotted = ast.unparse(node)
        first, dot, rest = dotted.partition(".")
        if names.get(first, first) + dot + rest in TIME_OF_DAY:
            yield node.lineno, dotted


def test_only_named_modules_ask_for_the_time_of_day() -> None:
    found: dict[str, list[tuple[int, str]]] = {}
    files = [ROOT / "llmpi.py", *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))]
    for path in files:
        if uses := list(times_of_day(path.read_text(encoding="utf-8"))):
            found[path.relative_to(ROOT).as_posix()] = uses
    assert {name: uses for name, uses in found.items() if name not in ALLOWED} == {}
    assert sorted(found) == sorted(ALLOWED), "a module that no longer asks is no longer to be named"


@pytest.mark.parametrize(
    "source",
    [
        "import time\nbegan = time.time()",
        "import time as t\nclock = t.time",
        "from time import time\ntime()",
        "from time import time_ns as now\nnow()",
        "from datetime import datetime\ndatetime.now()",
        "import datetime\ndatetime.datetime.utcnow()",
        "import datetime as dt\ndt.date.today()",
    ],
)
def test_every_way_to_ask_is_found(source: str) -> None:
    assert [line for line, _ in times_of_day(source)] == [2]


def test_monotonic_clocks_are_not_taken_for_others() -> None:
    source = "import time\nfrom datetime import datetime\ntime.monotonic()\ntime.sleep(1)\ndatetime.fromtimestamp(0)"
    assert list(times_of_day(source)) == []


def test_folders_of_the_product_are_all_looked_at() -> None:
    packages = {path.parent.name for path in Path(ROOT).glob("*/__init__.py")} - {"tests"}
    assert packages <= set(FOLDERS)
