"""How long an engine takes for a batch, from what is in the batch: the model behind the simulated engine.

A pass is one llama_decode with everything that comes with it: filling the batch, choosing tokens, booking them. Its
time is a sum over what is in it:

    rows of sequences that decode    `decode_s`, a function of their number: measured points, lines between them
    prompts that are read            `read_pass_s` once, `read_token_s` for each token
    cells that are attended to       `decode_cell_s` or `read_cell_s` for each row and each cell it looks at
    tokens that are chosen           `choose_row_s` each

All are times of one context while every other context of its engine works as hard: what they take from each other is
in the figures. `scheduling.calibration` makes them from measurements, `workers.simulated` waits as long as they say,
and whoever simulates a cluster asks `request_s`. Nothing here knows how an engine is built.
"""

from __future__ import annotations

import math
from itertools import pairwise

import msgspec

from scheduling.errors import ConfigError

VERSION = 1


class Measured(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the times were measured on. `slots` are all contexts' together, `threads` too.

    steady: prompts are read in passes of their own, and idle slots take part in decoding, as a GPU likes it.
    model_bytes and cell_bytes: of the weights, and of what the caches keep of one token; 0 where unknown.
    """

    model: str
    model_digest: str
    model_desc: str
    model_bytes: int
    cell_bytes: int
    backend: str
    device: str
    llama_cpp_python: str
    slots: int
    contexts: int
    ctx_tokens: int
    batch_tokens: int
    ubatch_tokens: int
    threads: int
    steady: bool


class ServiceTimes(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times in seconds. See the module's text for what each of them is for.

    decode_rows, decode_s: a pass in which so many sequences have one row each takes so long, cells and choosing apart.
    The first number is 1. Between two points the time is on the line between them; beyond the last it goes on like
    between the last two; if there is only one, two rows take twice as long.

    Raises ConfigError for what cannot be times of an engine.
    """

    measured: Measured
    decode_rows: tuple[int, ...]
    decode_s: tuple[float, ...]
    read_pass_s: float
    read_token_s: float
    decode_cell_s: float = 0.0
    read_cell_s: float = 0.0
    choose_row_s: float = 0.0
    version: int = VERSION

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ConfigError(
                f"service times of version {self.version} are not known here, only version {VERSION}: "
                "measure them again with `llmpi bench engine --calibrate`"
            )
        if not self.decode_rows or len(self.decode_rows) != len(self.decode_s):
            raise ConfigError(
                f"decode_rows has {len(self.decode_rows)} numbers and decode_s {len(self.decode_s)}: "
                "there must be as many of both, one at least"
            )
        if self.decode_rows[0] != 1 or any(b <= a for a, b in pairwise(self.decode_rows)):
            raise ConfigError(f"decode_rows is {list(self.decode_rows)}: it must begin with 1 and rise")
        for name in ("read_pass_s", "read_token_s", "decode_cell_s", "read_cell_s", "choose_row_s"):
            _check_seconds(name, getattr(self, name))
        for value in self.decode_s:
            _check_seconds("decode_s", value)
        if any(b < a for a, b in pairwise(self.decode_s)):
            raise ConfigError(f"decode_s is {list(self.decode_s)}: a pass over more rows must not take less time")

    # ------------------------------------------------ one pass

    def pass_s(
        self,
        *,
        decode_rows: int = 0,
        decode_cells: int = 0,
        read_tokens: int = 0,
        read_cells: int = 0,
        chosen: int = 0,
    ) -> float:
        """A pass with this in it. Cells are counted once for every row that looks at them."""
        reading_s = self.read_pass_s + read_tokens * self.read_token_s if read_tokens else 0.0
        cells_s = decode_cells * self.decode_cell_s + read_cells * self.read_cell_s
        return self.rows_s(decode_rows) + reading_s + cells_s + chosen * self.choose_row_s

    def rows_s(self, rows: int) -> float:
        """The part of a pass that `rows` decoding sequences take, cells and choosing apart; 0.0 for none."""
        if rows <= 0:
            return 0.0
        points = list(zip(self.decode_rows, self.decode_s, strict=True))
        if len(points) == 1:
            return rows * points[0][1]
        segment = next(((a, b) for a, b in pairwise(points) if rows <= b[0]), (points[-2], points[-1]))
        (rows_a, s_a), (rows_b, s_b) = segment
        return s_a + (s_b - s_a) * (rows - rows_a) / (rows_b - rows_a)

    # ------------------------------------------------ what follows from it

    def decode_step_s(self, batch: int, cells: int = 0) -> float:
        """A step that gives each of `batch` sequences of one context a token, each looking at `cells` cells."""
        return self.pass_s(decode_rows=batch, decode_cells=batch * cells, chosen=batch)

    @property
    def prefill_tokens_per_s(self) -> float:
        """The rate at which long batches of prompts are read, cells apart; infinite if it costs nothing."""
        return 1.0 / self.read_token_s if self.read_token_s else math.inf

    def prefill_s(self, prompt_tokens: int) -> float:
        """From the start of a prompt, nothing else running, to its first token of output."""
        if prompt_tokens <= 1:
            return self.decode_step_s(1, prompt_tokens)
        cells = prompt_tokens * (prompt_tokens + 1) // 2
        return self.pass_s(read_tokens=prompt_tokens, read_cells=cells, chosen=1)

    def request_s(self, prompt_tokens: int, output_tokens: int, running: int = 1) -> float:
        """From the start of a request to its end, while a context always runs `running` requests like it.

        In that time the prompt of each of the others is read once, too: `running / request_s` are ended each second.
        """
        steps = max(0, output_tokens - 1)
        cells = prompt_tokens + output_tokens // 2
        return max(1, running) * self.prefill_s(prompt_tokens) + steps * self.decode_step_s(max(1, running), cells)

    def scaled(self, factor: float) -> ServiceTimes:
        """The same engine, everything taking `factor` times as long. Raises ConfigError for what is no factor."""
        _check_seconds("the factor of time", factor)
        return msgspec.structs.replace(
            self,
            decode_s=tuple(value * factor for value in self.decode_s),
            read_pass_s=self.read_pass_s * factor,
            read_token_s=self.read_token_s * factor,
            decode_cell_s=self.decode_cell_s * factor,
            read_cell_s=self.read_cell_s * factor,
            choose_row_s=self.choose_row_s * factor,
        )


def parse_service_times(data: bytes, where: str) -> ServiceTimes:
    """Service times from JSON. Raises ConfigError that names `where` they come from and what is wrong."""
    try:
        return msgspec.json.decode(data, type=ServiceTimes)
    except (msgspec.DecodeError, ConfigError) as error:
        raise ConfigError(
            f"{where} does not hold service times: {error}. `llmpi bench engine --calibrate` makes such a file"
        ) from None


def service_times_json(times: ServiceTimes) -> bytes:
    """The JSON that `parse_service_times` reads, for people too."""
    return msgspec.json.format(msgspec.json.encode(times), indent=2) + b"\n"


def _check_seconds(name: str, value: float) -> None:
    if not 0.0 <= value < math.inf:
        raise ConfigError(f"{name} is {value}: it must be 0 or more, and finite")


EXAMPLE = ServiceTimes(
    measured=Measured(
        model="SmolLM2-135M-Instruct.Q4_1", model_digest="", model_desc="llama 135M Q4_1 (rounded)",
        model_bytes=97_000_000, cell_bytes=23_040, backend="CPU", device="CPU, 1 thread", llama_cpp_python="0.3.36",
        slots=8, contexts=1, ctx_tokens=2048, batch_tokens=2048, ubatch_tokens=512, threads=1, steady=False,
    ),
    decode_rows=(1, 2, 4, 8), decode_s=(0.012, 0.024, 0.038, 0.070), read_pass_s=0.008, read_token_s=0.006,
    decode_cell_s=6e-6, read_cell_s=2e-6, choose_row_s=6e-5,
)  # fmt: skip
"""Rounded figures of a small model on one processor core, for whoever has no file."""
