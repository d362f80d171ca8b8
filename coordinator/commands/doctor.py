"""`llmpi doctor`: parsing and help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coordinator.commands.parameters import AsJson, StageDir


def doctor(
    model: Annotated[
        str | None, typer.Option("-m", "--model", help="Model that every host must see: a file, or one of the store.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Where runs are to be written. [default: the current folder]"),
    ] = None,
    stage_dir: StageDir = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out how fast file systems are, and large messages.")
    ] = False,
    timeout: Annotated[
        float,
        typer.Option(
            min=1.0, help="Seconds that a rank may take to answer; a third of it for each thing that it asks."
        ),
    ] = 60.0,
    as_json: AsJson = False,
) -> None:
    """Look at what a job would find here, and say what to mend. Alone, or under mpirun or srun.

    Exit 0 if a job can run, also with warnings; 4 with errors.
    """
    from coordinator.doctor.examining import run_doctor
    from coordinator.doctor.gather import Options

    options = Options(model=model, run_dir=run_dir, stage_dir=stage_dir, quick=quick, patience_s=timeout / 3)
    raise typer.Exit(run_doctor(options, timeout_s=timeout, as_json=as_json))
