"""What Slurm says of this job."""

from __future__ import annotations

import msgspec

from coordinator.doctor.findings import Finding, ok, time_text, warning
from coordinator.durations import duration

SOON_S = 600.0


class SlurmFacts(msgspec.Struct, frozen=True, kw_only=True):
    """`problem`: why Slurm could not be asked. `requeue` None, '' and None elsewhere: not told."""

    job: str
    problem: str = ""
    state: str = ""
    partition: str = ""
    nodes: str = ""
    left_s: float | None = None
    unlimited: bool = False
    limit: str = ""
    partition_limit: str = ""
    requeue: bool | None = None
    restarts: int = 0


def about_slurm(facts: SlurmFacts | None) -> list[Finding]:
    if facts is None:
        return [ok("job", "not inside a Slurm job")]
    if facts.problem:
        return [
            warning(f"job {facts.job}", f"Slurm cannot be asked: {facts.problem}",
                    "nothing is lost: the job goes by Slurm's signal then; --time-limit says when it must be gone",
                    command=f"scontrol show job {facts.job}")
        ]  # fmt: skip
    findings = [ok(f"job {facts.job}", f"{facts.state or 'state not told'} on {facts.nodes or 'nodes not told'}")]
    limits = f"limit {facts.limit or 'not told'}, partition {facts.partition or 'not told'} allows "
    limits += facts.partition_limit or "(not told)"
    if facts.left_s is None:
        findings.append(ok("time left", f"{'no end' if facts.unlimited else 'not told'}; {limits}"))
    elif facts.left_s < SOON_S:
        findings.append(
            warning("time left", f"{time_text(max(0.0, facts.left_s))}; {limits}",
                    "a run ends in order before that and is resumed by the next job: `llmpi submit` chains jobs")
        )  # fmt: skip
    else:
        findings.append(ok("time left", f"{duration(facts.left_s)}; {limits}"))
    if facts.requeue is None:
        findings.append(ok("requeue", "not told"))
    elif facts.requeue:
        again = f", restarted {facts.restarts} times so far" if facts.restarts else ""
        findings.append(ok("requeue", f"allowed{again}: --on-limit requeue and preemption start the job again"))
    else:
        findings.append(
            warning("requeue", "not allowed: a job that is preempted, or whose node fails, is not started again",
                    "submit with --requeue", command="sbatch --requeue …")
        )  # fmt: skip
    return findings
