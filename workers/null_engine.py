"""An engine that computes nothing and answers at once, inside the rank: it shows what everything else costs.

It speaks the engine's protocol exactly. Each answer has `answer_bytes` of text. Used by `llmpi bench dispatch`, by
tests and wherever only the way of a request is of interest.
"""

from __future__ import annotations

from workers.protocol import Answer, Choice, EngineLoaded, Frame, FromEngine, Job, Returned


class NullEngine:
    """`workers.port.Engine` without an engine. Everything submitted is answered at the next poll."""

    def __init__(self, slots: int, answer_bytes: int = 200) -> None:
        self._said: list[FromEngine] = [
            EngineLoaded(
                load_s=0.0, vocab_tokens=0, train_ctx_tokens=0, slots=slots, model_desc="null", model_bytes=0,
                backend="null", chat_template=False,
            )
        ]  # fmt: skip
        self._jobs: list[Job] = []
        tokens = max(1, answer_bytes // 4)
        self._choices = [Choice("x" * answer_bytes, "length", tokens)]
        self._tokens = tokens
        self._open = True

    def submit(self, jobs: list[Job]) -> None:
        self._jobs.extend(jobs)

    def recall(self, recall_id: int, keys: list[int]) -> None:
        asked = set(keys)
        returned = [job.key for job in self._jobs if job.key in asked]
        self._jobs = [job for job in self._jobs if job.key not in asked]
        self._said.append(Returned(recall_id, returned))

    def cancel(self, keys: list[int]) -> None:
        """Nothing runs long enough to be stopped: those asked for are answered like the rest."""

    def poll(self) -> list[FromEngine]:
        said, self._said = self._said, []
        if self._jobs:
            jobs, self._jobs = self._jobs, []
            choices, tokens = self._choices, self._tokens
            said.append(Frame(finished=[Answer(job.key, choices, 256, tokens, 0.0, 0.0, 0.0) for job in jobs]))
        return said

    def fileno(self) -> int | None:
        return None

    @property
    def alive(self) -> bool:
        return self._open

    @property
    def pid(self) -> int | None:
        return None

    def exit_reason(self) -> str:
        return "" if self._open else "closed"

    def close(self, timeout_s: float) -> None:
        self._open = False
