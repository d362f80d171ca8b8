"""`llmpi submit`, and what its scripts call: parsing and help."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coordinator.commands.parameters import AsJson
from scheduling.errors import ConfigError, ModelFileError, ModelStoreError

HERE = {"ignore_unknown_options": True, "allow_extra_args": True}


def submit(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[SBATCH OPTIONS] -- batch OPTIONS", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and print the script; submit nothing.")] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the run until no job of it is left; exit as `llmpi status` does.")
    ] = False,
    no_chain: Annotated[
        bool, typer.Option("--no-chain", help="One job, even if the run takes longer than a job may.")
    ] = False,
    launcher: Annotated[
        Literal["mpirun", "srun"], typer.Option(help="What starts the ranks inside the job (docs/slurm.md).")
    ] = "mpirun",
    as_json: AsJson = False,
) -> None:
    """Run a batch as Slurm jobs, one after another until all is done.

    Options of sbatch come first, as sbatch takes them; behind `--` stands the command. The script is checked against
    what sinfo says, and kept in RUN_DIR/slurm.

    llmpi submit --nodes 2 --ntasks-per-node 4 --gpus-per-node 4 --wait -- batch -m MODEL -i FILE -o RUN_DIR
    """
    from coordinator.slurmjobs.submitting import SubmitOptions, own_words, submit_run

    options, command = own_words(sys.argv[2:])
    run_dir, arguments = _checked(context, command)
    raise typer.Exit(
        submit_run(
            options, arguments, run_dir,
            SubmitOptions(launcher=launcher, chained=not no_chain, dry_run=dry_run, wait=wait, as_json=as_json),
        )
    )  # fmt: skip


def _checked(context: typer.Context, command: list[str]) -> tuple[Path, list[str]]:
    """The run directory of a `batch` command, and its other arguments; what is mistyped is told now, not in a job."""
    if command[:1] == ["llmpi"]:
        command = command[1:]
    if not command or command[0] != "batch":
        told = command[0] if command else "nothing"
        raise ConfigError(f"only batch can be submitted, not {told}: … -- batch -m MODEL …")
    assert context.parent is not None
    batch: Any = context.parent.command.get_command(context.parent, "batch")  # type: ignore[attr-defined]
    with batch.make_context("batch", list(command[1:]), parent=context.parent) as parsed:
        values = dict(parsed.params)
    missing = [name for name, key in (("-m", "model"), ("-i", "requests"), ("-o", "output")) if not values.get(key)]
    if values.get("replay"):
        missing = [name for name in missing if name == "-o"]
    if missing:
        raise ConfigError(f"batch needs {', '.join(missing)}")
    if values.get("on_limit") == "requeue":
        raise ConfigError("--on-limit requeue is not needed here: the next job goes on with the run")
    given = values.get("requests")
    if given is not None and not Path(given).exists():
        why = "a job has no standard input" if str(given) == "-" else "there is no such file"
        raise ConfigError(f"-i {given}: {why}")
    if values.get("model"):
        _look_at_model(str(values["model"]))
    return Path(values["output"]).absolute(), without_output(command[1:])


def _look_at_model(text: str) -> None:
    """Say if there is no such model here. It may be on the nodes alone, so that is no error."""
    from coordinator.modelnames import find_model

    try:
        found = find_model(text)
        why = "" if found.path.exists() else "there is no such file"
    except (ModelFileError, ModelStoreError) as error:
        why = str(error)
    if why:
        print(f"note: -m {text}: {why}. The nodes must have it", file=sys.stderr)


def without_output(arguments: list[str]) -> list[str]:
    """Arguments of `batch` less its run directory."""
    kept, words = [], iter(arguments)
    for word in words:
        if word in ("-o", "--output"):
            next(words, None)
        elif not (word.startswith("--output=") or (word.startswith("-o") and not word.startswith("--"))):
            kept.append(word)
    return kept


job = typer.Typer(name="slurm-job", hidden=True, help="What scripts of `llmpi submit` call in a job.")


@job.command()
def begin(run_dir: Path) -> None:
    """Submit the job that follows this one; print variables for the shell."""
    from coordinator.slurmjobs.chain import NEXT, PREVIOUS
    from coordinator.slurmjobs.chain import begin as begin_job

    link, told = begin_job(run_dir)
    if told:
        print(f"llmpi: {told}", file=sys.stderr)
    print(f"{PREVIOUS}={shlex.quote(link.previous)} {NEXT}={shlex.quote(link.next)}")


@job.command()
def end(run_dir: Path, status: int, following: Annotated[str, typer.Argument()] = "") -> None:
    """Take the job that follows back if nothing is left for it to do."""
    from coordinator.slurmjobs.chain import end as end_job

    if told := end_job(run_dir, status, following):
        print(f"llmpi: {told}", file=sys.stderr)
