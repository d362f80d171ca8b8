"""The example hostfiles: each in its launcher's syntax, and each with the command that fits its slots."""

from __future__ import annotations

import re

import pytest

import hostfiles

OPENMPI_LINE = re.compile(r"[\w.-]+ slots=([1-9]\d*)")
MPICH_LINE = re.compile(r"[\w.-]+:([1-9]\d*)")


def test_examples_come_with_the_package() -> None:
    assert hostfiles.names() == ["mpich.txt", "openmpi-cpu.txt", "openmpi.txt"]
    with pytest.raises(FileNotFoundError, match=r"mpich\.txt"):
        hostfiles.text("other.txt")


@pytest.mark.parametrize("name", hostfiles.names())
def test_each_line_is_in_the_launchers_syntax_and_the_slots_are_those_of_the_command(name: str) -> None:
    text = hostfiles.text(name)
    line = MPICH_LINE if name.startswith("mpich") else OPENMPI_LINE
    hosts = [line.fullmatch(host) for host in text.splitlines() if not host.startswith("#")]
    slots = sum(int(found[1]) for found in hosts if found is not None)
    assert None not in hosts
    (command,) = re.findall(r"mpirun .* -n (\d+) llmpi batch", text)
    assert int(command) == slots
    assert f" {name} " in text
