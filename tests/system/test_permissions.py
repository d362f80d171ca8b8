"""What another user owns: each command says in one line what it may not do, and ends with 2."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch import PATIENCE_S, ROOT

pytestmark = [pytest.mark.system, pytest.mark.slow]

ENGINE = ("-m", "any", "--engine", "simulated")
COMMANDS = [
    ("status", "closed"),
    ("stop", "closed/run"),
    ("report", "closed"),
    ("export", "closed", "--to", "csv"),
    ("batch", *ENGINE, "-i", "mute.jsonl", "-o", "run"),
    ("batch", *ENGINE, "-i", "closed", "-o", "run"),
    ("batch", *ENGINE, "-i", "in.jsonl", "-o", "closed"),
    ("batch", *ENGINE, "-i", "in.jsonl", "-o", "closed/run"),
    ("batch", "-m", "closed/m.gguf", "-i", "in.jsonl", "-o", "run"),
    ("batch", "-m", "mute.jsonl", "-i", "in.jsonl", "-o", "run"),
    ("infer", "-m", "closed/m.gguf", "-p", "hello"),
    ("models", "add", "mute.jsonl"),
    ("models", "add", "closed"),
    ("study", "scaling", *ENGINE, "-i", "in.jsonl", "-o", "closed", "--workers", "1"),
    ("study", "show", "closed"),
    ("bench", "engine", "-m", "mute.jsonl"),
]
ONE_AFTER_ANOTHER = """
import json, os, sys
from coordinator import cli
ends = []
for number, words in enumerate(json.loads(sys.argv[1])):
    sys.argv = ["llmpi", *words]
    path = f"said-{number}"
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), 2)  # an mpirun that is started says its part there, too
    try:
        cli.main()
    except SystemExit as ended:
        with open(path) as said:
            ends.append([ended.code, [line for line in said if line.startswith(("llmpi", "Traceback"))]])
    os.remove(path)
print(json.dumps(ends))
"""


def test_each_command_says_in_a_line_what_it_may_not_do(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "mute.jsonl").touch(mode=0)
    (tmp_path / "closed").mkdir(mode=0)
    as_any_user: list[str] = []
    if os.geteuid() == 0:
        program = shutil.which("setpriv")
        if program is None:
            pytest.fail("setpriv of util-linux is needed to be a root who may not do everything")
        without = "-dac_override,-dac_read_search"
        as_any_user = [program, "--bounding-set", without, "--inh-caps", without]
    command = [*as_any_user, sys.executable, "-c", ONE_AFTER_ANOTHER, json.dumps(COMMANDS)]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "LLMPI_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        command, cwd=tmp_path, env=environ, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    assert len(ends) == len(COMMANDS)
    for words, (status, lines) in zip(COMMANDS, ends, strict=True):
        assert status == 2, (words, lines)
        assert len(lines) == 1, (words, lines)
        assert lines[0].startswith("llmpi: "), (words, lines)
        assert "Permission denied" in lines[0], (words, lines)
        assert "closed" in lines[0] or "mute.jsonl" in lines[0], (words, lines)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["closed", "in.jsonl", "mute.jsonl"]
