#!/usr/bin/env python3
"""Print what setup.cfg requires, a line each as pip reads them: always, and for the extras that are named.

With it an environment gets everything but what has to be compiled, while that compiles. Standard library alone.

    python scripts/requirements.py [--without NAME] [EXTRA ...]
"""

from __future__ import annotations

import argparse
import re
from configparser import ConfigParser
from pathlib import Path

SETUP = Path(__file__).resolve().parent.parent / "setup.cfg"


def requirements(setup: Path, extras: list[str], without: str | None = None) -> list[str]:
    """Of `install_requires` and of each extra in `setup`, but for the package `without`. KeyError: no such extra."""
    config = ConfigParser()
    with setup.open(encoding="utf-8") as file:
        config.read_file(file)
    given = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    lines = [line.strip() for text in given for line in text.splitlines() if line.strip()]
    return [line for line in lines if re.split(r"[^\w.-]", line)[0] != without]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--without", metavar="NAME", help="a package that is not wanted")
    parser.add_argument("extras", nargs="*", metavar="EXTRA")
    asked = parser.parse_args()
    print(*requirements(SETUP, asked.extras, asked.without), sep="\n")


if __name__ == "__main__":
    main()
