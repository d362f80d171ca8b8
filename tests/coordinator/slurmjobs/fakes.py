"""A Slurm that answers from a table, and writes down what it was asked to do."""

from __future__ import annotations

from collections.abc import Sequence

from scheduling.errors import InfrastructureError

SINFO = """main*|up|1:00:00|n/a|2|8|gpu:a100:4(S:0-1)|idle
main*|up|1:00:00|n/a|6|8|gpu:a100:4(S:0-1),shard:8|mix
cpu|up|infinite|30:00|10|64+|(null)|idle
short|up|1:00|1:00|1|8|gpu:2|alloc
off|down|1-00:00:00|n/a|1|8|(null)|idle
"""


class FakeSlurm:
    """`queue`: what squeue shows, by job; `over`: how jobs ended. Jobs that are submitted wait."""

    def __init__(self, sinfo: str = SINFO) -> None:
        self.sinfo = sinfo
        self.queue: dict[str, tuple[str, str]] = {}
        self.over: dict[str, str] = {}
        self.calls: list[list[str]] = []
        self.fails: dict[str, str] = {}
        self.next_job = 100

    def __call__(self, command: Sequence[str]) -> str:
        words = list(command)
        self.calls.append(words)
        if words[0] in self.fails:
            raise InfrastructureError(f"{words[0]}: {self.fails[words[0]]}")
        answers = {"sinfo": self._sinfo, "sbatch": self._sbatch, "squeue": self._squeue, "scancel": self._scancel}
        return answers[words[0]](words)

    def _sinfo(self, words: list[str]) -> str:
        return self.sinfo

    def _sbatch(self, words: list[str]) -> str:
        job = str(self.next_job)
        self.next_job += 1
        self.queue[job] = ("PENDING", "(Dependency)" if any("--dependency" in word for word in words) else "(Priority)")
        return f"{job};cluster\n"

    def _squeue(self, words: list[str]) -> str:
        asked = words[words.index("-j") + 1].split(",")
        if "all" in words and asked[0] in self.over:
            return f"{asked[0]}|{self.over[asked[0]]}|\n"
        there = [job for job in asked if job in self.queue]
        if not there and len(asked) == 1:
            raise InfrastructureError("squeue: slurm_load_jobs error: Invalid job id specified")
        there.sort(key=lambda job: self.queue[job][0] == "RUNNING")  # as squeue does, those that wait come first
        return "".join(f"{job}|{self.queue[job][0]}|{self.queue[job][1]}\n" for job in there)

    def _scancel(self, words: list[str]) -> str:
        self.queue.pop(words[1], None)
        return ""

    def submitted(self) -> list[list[str]]:
        return [call for call in self.calls if call[0] == "sbatch"]
