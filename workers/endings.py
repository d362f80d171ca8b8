"""What a worker tells of a request that has ended: its line for the record, its row of metrics, its counters.

The worker's clock and the clock of the day come as arguments; what is made of them is sent by `workers.worker`.
"""

from __future__ import annotations

from collections.abc import Callable

from scheduling import messages as m
from scheduling.recordline import encode_embeddings, encode_failure, encode_result
from scheduling.requests import Request
from scheduling.tables import finish_number
from scheduling.vectors import from_bytes
from workers.metrics import RankMetrics
from workers.protocol import Answer

CANCELLED = "cancelled"
NAN = float("nan")


class Held:
    """One request with a worker.

    `started_at`: when the engine said that it has taken it up, None before. `overdue` once it was stopped for its time.
    """

    __slots__ = ("attempt", "overdue", "request", "started_at", "stolen_from")

    def __init__(self, attempt: int, request: Request, stolen_from: int | None) -> None:
        self.attempt = attempt
        self.stolen_from = stolen_from
        self.request = request
        self.started_at: float | None = None
        self.overdue = False


class Endings:
    """Ends requests of one worker: each method counts one in `metrics` and returns what rank 0 is to be told."""

    def __init__(
        self, rank: int, model_name: str, metrics: RankMetrics, clock: Callable[[], float],
        wall_clock: Callable[[], float], timeout_s: float | None,
    ) -> None:  # fmt: skip
        self.born = clock()
        """Ends are told in seconds since then."""
        self._rank = rank
        self._model_name = model_name
        self._metrics = metrics
        self._clock = clock
        self._wall_clock = wall_clock
        self._timeout_s = timeout_s

    def answered(self, one: Held, answer: Answer) -> m.Finished:
        """The engine has ended a request, well or not."""
        cancelled = any(choice.finish_reason == CANCELLED for choice in answer.choices)
        if one.overdue and cancelled:
            return self._not_done(
                one, answer, "timeout",
                f"it ran for longer than --request-timeout {self._timeout_s:g} and was stopped after "
                f"{answer.output_tokens} tokens of output",
            )  # fmt: skip
        if answer.error is not None:
            return self._not_done(one, answer, "request_failed", answer.error)
        if one.request.inputs and cancelled:
            # Some vectors are worth nothing: unlike a text, this answer has no useful beginning.
            return self._not_done(one, answer, CANCELLED, "the request was cancelled")
        metrics, end_s = self._metrics, self._now_s()
        line = self._line(one, answer, end_s)
        tokens = answer.output_tokens
        tpot_s = (answer.e2e_s - answer.ttft_s) / (tokens - 1) if tokens > 1 and len(answer.choices) == 1 else NAN
        metrics.requests.append(
            (
                answer.key, self._rank, one.attempt, metrics.session, answer.prompt_tokens, answer.cached_tokens,
                tokens, answer.queue_s, answer.ttft_s if tokens else NAN, tpot_s, answer.e2e_s,
                end_s, _number_of(one.stolen_from), finish_number(answer.choices[0].finish_reason), 1,
            )
        )  # fmt: skip
        metrics.finished += 1
        metrics.prompt_tokens += answer.prompt_tokens
        metrics.cached_tokens += answer.cached_tokens
        metrics.output_tokens += tokens
        return m.Finished(answer.key, one.attempt, True, answer.prompt_tokens, tokens, line)

    def refused(self, item: m.WorkItem, reason: str) -> m.Finished:
        """A line that is no request."""
        return self._failed(
            item.index, item.attempt, f"request-{item.index}", "invalid_request", reason, stolen_from=item.stolen_from
        )

    def _not_done(self, one: Held, answer: Answer, code: str, reason: str) -> m.Finished:
        return self._failed(
            answer.key, one.attempt, one.request.custom_id, code, reason, answer.prompt_tokens, answer.queue_s,
            answer.e2e_s, answer.cached_tokens, one.stolen_from,
        )  # fmt: skip

    def _now_s(self) -> float:
        """A ten thousandth of a second is finer than what a frame's way takes."""
        return round(self._clock() - self.born, 4)

    def _line(self, one: Held, answer: Answer, end_s: float) -> bytes:
        """The record's line of a request that was answered."""
        request, session = one.request, self._metrics.session
        if request.inputs:
            return encode_embeddings(
                request, answer.key, one.attempt, self._rank, session,
                from_bytes(answer.vectors, len(request.inputs)), answer.prompt_tokens, answer.queue_s, answer.e2e_s,
                self._model_name, end_s, one.stolen_from,
            )  # fmt: skip
        choices = [(choice.text, choice.finish_reason, choice.output_tokens) for choice in answer.choices]
        return encode_result(
            request, answer.key, one.attempt, self._rank, session, choices, answer.prompt_tokens,
            answer.output_tokens, answer.queue_s, answer.ttft_s, answer.e2e_s, int(self._wall_clock()),
            self._model_name, answer.cached_tokens, [choice.logprobs for choice in answer.choices],
            end_s, one.stolen_from,
        )  # fmt: skip

    def _failed(
        self, index: int, attempt: int, custom_id: str, code: str, reason: str,
        prompt_tokens: int = 0, queue_s: float = 0.0, e2e_s: float = 0.0, cached_tokens: int = 0,
        stolen_from: int | None = None,
    ) -> m.Finished:  # fmt: skip
        metrics, end_s = self._metrics, self._now_s()
        line = encode_failure(
            custom_id, index, attempt, self._rank, metrics.session, code, reason, prompt_tokens, queue_s, e2e_s,
            cached_tokens, end_s, stolen_from,
        )  # fmt: skip
        metrics.requests.append(
            (
                index, self._rank, attempt, metrics.session, prompt_tokens, cached_tokens, 0, queue_s, NAN, NAN, e2e_s,
                end_s, _number_of(stolen_from), finish_number("error"), 0,
            )
        )  # fmt: skip
        metrics.finished += 1
        metrics.failed += 1
        metrics.prompt_tokens += prompt_tokens
        metrics.cached_tokens += cached_tokens
        return m.Finished(index, attempt, False, prompt_tokens, 0, line)


def _number_of(rank: int | None) -> int:
    return -1 if rank is None else rank
