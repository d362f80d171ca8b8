"""The command line: which commands there are, and how what goes wrong ends. Each is a module of `coordinator.commands`.

`llmpi --help` starts neither MPI, nor CUDA, nor llama.cpp. Every error a user can mend ends as one line and an exit
code (see `scheduling.errors`); under a launcher only one rank prints it.
"""

from __future__ import annotations

import errno
import io
import os
import sys
import traceback
from typing import Annotated, Any

import typer

from coordinator.commands.batch import batch
from coordinator.commands.bench import bench
from coordinator.commands.doctor import doctor
from coordinator.commands.infer import embed, infer
from coordinator.commands.models import models
from coordinator.commands.runs import export, report, status, stop
from coordinator.commands.sections import Sectioned
from coordinator.commands.study import study
from coordinator.commands.submit import HERE as SBATCH_WORDS
from coordinator.commands.submit import job, submit
from coordinator.launch import Launch, detect
from coordinator.leaving import leave
from scheduling.errors import EXIT_INFRASTRUCTURE, EXIT_OK, EXIT_USAGE, LlmpiError
from scheduling.wording import printable

_KEPT = "\n\t" + "".join(map(chr, range(0xDC80, 0xDD00)))
"""Of an error's words: lines, and bytes of names that are no UTF-8. Names may be a server's, or a file's."""

_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.EISDIR}
_FAILURES = {errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ENOTCONN, errno.ECONNABORTED, errno.ETIMEDOUT}
"""What an operating system says of a path that is no error of ours, and is the user's to mend, or the file system's."""

app = typer.Typer(
    name="llmpi",
    help="Run llama.cpp on every GPU of a workstation or a cluster, under mpirun or srun, with no other service.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"max_content_width": 120},
)
for command in (batch, infer, embed, status, stop, report, export, doctor):
    app.command(cls=Sectioned)(command)
app.command(context_settings=SBATCH_WORDS)(submit)
for group in (bench, models, job, study):
    app.add_typer(group)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", is_eager=True)] = False,
) -> None:
    if version:
        from coordinator.versions import package_version

        print(f"llmpi {package_version('llmpi')}")
        raise typer.Exit(0)


def commands() -> Any:
    """All commands as one, of which none looks at the paths that it is given before it runs.

    A check ahead of time says the wrong thing of a file system that is gone ("not readable", a mistake of the user's),
    and what opens a path has to say what is wrong with it anyway.
    """
    whole = typer.main.get_command(app)
    found = [whole]
    for command in found:
        found += getattr(command, "commands", {}).values()
        for parameter in command.params:
            if hasattr(parameter.type, "readable"):
                parameter.type.readable = False
    return whole


def _told(launch: Launch, text: str, code: int) -> int:
    """Say what concerns all ranks on one, which also carries the status.

    mpirun ends the job at the first status that is not 0: another rank's would cut off what this one has to say.
    """
    if not launch.speaks:
        return EXIT_OK
    print(text, file=sys.stderr, flush=True)
    return code


def _usage_text(error: typer.TyperException) -> str:
    """What was mistyped, in one line; or the help that was asked for by giving nothing."""
    context = getattr(error, "ctx", None)
    said = error.format_message()
    if context is None:
        return f"llmpi: {said}"
    if type(error).__name__ == "NoArgsIsHelpError":
        return str(context.get_help())
    if said.startswith("Missing option "):
        said = f"missing {'/'.join(error.param.opts)}"  # type: ignore[attr-defined]
    return f"llmpi: {said} (`{context.command_path} --help` lists what there is)"


def main() -> None:
    """Entry point: run a command, print what a person should know of a failure, exit with its code."""
    try:
        code: Any = _run()
    except SystemExit as ended:
        code = EXIT_OK if ended.code is None else ended.code
    sys.exit(leave(code) if isinstance(code, int) else code)


def _write_any_character() -> None:
    """What the encoding of a stream lacks is written as its code: an answer or the name of a file may hold anything."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run() -> int:
    _write_any_character()
    launch = detect(os.environ)
    try:
        result = commands()(standalone_mode=False, prog_name="llmpi")
        return result if isinstance(result, int) else 0
    except typer.Exit as asked:
        return asked.exit_code
    except typer.Abort:
        return 130
    except typer.TyperException as error:
        return _told(launch, _usage_text(error), EXIT_USAGE)
    except LlmpiError as error:
        return _told(launch, f"llmpi: {printable(error, _KEPT)}", error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has left; Python's own flush at exit must not complain about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_INFRASTRUCTURE
    except OSError as error:
        if _is_gone(os.curdir):
            return _told(launch, "llmpi: the folder that this was started in is gone: start from another", EXIT_USAGE)
        if not isinstance(error.filename, str | bytes) or error.errno not in _REFUSALS | _FAILURES:
            return _bug()
        # On every rank: one that cannot go on leaves with a status that ends the job.
        said = f"llmpi: {os.fsdecode(error.filename)}: {os.strerror(error.errno)}. Mend that, then try again."
        print(printable(said, _KEPT), file=sys.stderr, flush=True)
        return EXIT_USAGE if error.errno in _REFUSALS else EXIT_INFRASTRUCTURE
    except Exception:
        return _bug()


def _is_gone(folder: str) -> bool:
    try:
        return not os.stat(folder).st_nlink
    except OSError as error:
        return error.errno in (errno.ENOENT, errno.ESTALE)


def _bug() -> int:
    """Print the error that is being handled, with all that helps to mend it."""
    print(f"llmpi: an error of its own (please report it):\n{traceback.format_exc()}", file=sys.stderr)
    return EXIT_INFRASTRUCTURE
