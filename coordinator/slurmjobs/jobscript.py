"""The script of a job: one of the templates of `slurm/`, with the options, the command and the chain in it.

It can be read, changed, and submitted again as it is: `sbatch RUN_DIR/slurm/job.sbatch`.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import slurm
from coordinator.slurmjobs.chain import NEXT, PREVIOUS, SCRIPT
from coordinator.slurmjobs.jobrequest import JobRequest, long_name
from coordinator.slurmjobs.journal import FOLDER
from scheduling.errors import ConfigError

_OPTION = re.compile(r"#SBATCH\s+(\S+)")


def write_script(launcher: str, wanted: JobRequest, run_dir: Path, command: Sequence[str], chained: bool) -> str:
    """The text. `command`: the arguments of `llmpi batch` without its run directory.

    Raises ConfigError: a run directory whose name sbatch cannot read.
    """
    if {"\n", "\\"} & set(str(run_dir)) or not _is_text(str(run_dir)):
        raise ConfigError(f"-o {str(run_dir)!r}: sbatch takes no line break, no \\ and nothing but UTF-8 in a name")
    lines = slurm.text(f"{launcher}.sbatch").splitlines()
    end = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    given = {long_name(word) for word in wanted.words if word.startswith("-")}
    options = [line for line in lines[1:end] if line.startswith("#SBATCH") and _name(line) not in given]
    if wanted.log is None:
        options = [line for line in options if _name(line) != "--output"]
        options.append(f"#SBATCH --output={_quoted(_plain(run_dir / FOLDER) + '/job-%j.log')}")
    if "--job-name" not in given:
        options = [line for line in options if _name(line) != "--job-name"]
        options.append(f"#SBATCH --job-name={_quoted('llmpi-' + run_dir.name)}")
    script = shlex.quote(str(run_dir / FOLDER / SCRIPT))
    written = [
        "#!/bin/bash",
        f"# Written by llmpi submit from {launcher}.sbatch. `sbatch {script}` submits it again.",
        *options,
        *(f"#SBATCH {option}" for option in _options(wanted.words)),
        "",
        f"export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH",
        f"set -- {shlex.join([str(run_dir), *command])}",
        *(_CHAIN.splitlines() if chained else []),
        *([] if "--chdir" in given else ["", f"cd -- {shlex.quote(str(Path.cwd()))} || exit 4"]),
        "",
        *lines[end:],
    ]
    return "\n".join(written) + "\n"


_CHAIN = f"""
# A signal may come at once: where it comes before what follows is ready for it, it is kept.
trap 'asked=USR2' USR2
trap 'asked=TERM' TERM

# The job after this one is submitted now, to begin when this one has ended, however that may be.
chain=$1
{NEXT}=
eval "$(llmpi slurm-job begin "$chain")"
export {PREVIOUS} {NEXT}
trap 'status=$?; llmpi slurm-job end "$chain" "$status" "${NEXT}"; exit "$status"' EXIT"""


def _name(line: str) -> str:
    found = _OPTION.match(line)
    return long_name(found[1]) if found else ""


def _options(words: Sequence[str]) -> list[str]:
    """One line for each option: words that do not begin with a dash are values of the one before."""
    lines: list[str] = []
    for word in words:
        if word.startswith("-") or not lines:
            name, equals, value = word.partition("=")
            if word.startswith("--"):
                lines.append(f"{name}={_quoted(value)}" if equals else word)
            else:
                lines.append(word if _quoted(word) == word else f"{word[:2]} {_quoted(word[2:])}")
        else:
            lines[-1] += f" {_quoted(word)}"
    return lines


def _plain(path: Path) -> str:
    """A path in which sbatch sees no pattern."""
    return str(path).replace("%", "%%")


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _quoted(value: str) -> str:
    """As sbatch reads it in a script."""
    if re.fullmatch(r"[\w@%+=:,./-]+", value):
        return value
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
