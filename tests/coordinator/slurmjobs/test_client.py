"""What a command of Slurm says, and whose mistake that is."""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.slurmjobs.partitions import run_client
from scheduling.errors import ConfigError, InfrastructureError, LlmpiError


@pytest.mark.parametrize(
    ("client", "said", "error"),
    [
        ("sbatch", "sbatch: option '--node=2' is ambiguous; possibilities: '--nodelist' '--nodes'", ConfigError),
        ("sbatch", "sbatch: unrecognized option '--foo'", ConfigError),
        ("sbatch", "sbatch: invalid option -- 'Z'", ConfigError),
        ("sbatch", 'sbatch: error: "x" is not a valid node count', ConfigError),
        ("sbatch", "sbatch: error: Invalid --mem specification", ConfigError),
        ("sbatch", 'sbatch: error: Invalid numeric value "x" for --cpus-per-task.', ConfigError),
        (
            "sbatch",
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller",
            InfrastructureError,
        ),
        ("squeue", "slurm_load_jobs error: Invalid job id specified", InfrastructureError),
    ],
)
def test_what_sbatch_cannot_read_is_the_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, client: str, said: str, error: type[LlmpiError]
) -> None:
    script = tmp_path / client
    script.write_text(
        f"#!/bin/sh\ncat >&2 <<'END'\n{said}\nTry \"{client} --help\" for more information\nEND\nexit 1\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(error, match=r"^(?:sbatch|squeue): ") as told:
        run_client([client])
    assert said.removeprefix(f"{client}: ") in str(told.value)
