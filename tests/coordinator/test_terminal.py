"""What tables look like where no terminal is: in a file, and in a pipe before which a person sits."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest
from rich.table import Table

from coordinator.terminal import PLAIN_WIDTH, console_for

LAUNCHERS = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_RANKID", "SLURM_STEP_ID"]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


def test_lines_in_a_file_end_with_what_they_say(tmp_path: Path) -> None:
    table = Table(box=None)
    table.add_column("rank")
    table.add_column("device", width=60)
    table.add_row("1", "CPU")
    with (tmp_path / "log").open("w") as stream:
        console_for(stream).print(table)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split() for line in lines] == [["rank", "device"], ["1", "CPU"]]
    assert all(line == line.rstrip() for line in lines)


def test_a_pipe_is_as_wide_as_the_terminal_beside_it_and_a_file_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 77, 0, 0))
    read, write = os.pipe()
    with os.fdopen(slave, "w") as terminal, os.fdopen(write, "w") as piped, (tmp_path / "log").open("w") as file:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert console_for(piped).width == 77
        assert console_for(file).width == PLAIN_WIDTH
        monkeypatch.setattr(sys, "stderr", file)
        assert console_for(piped).width == PLAIN_WIDTH
    os.close(master)
    os.close(read)
