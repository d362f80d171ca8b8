"""`llmpi bench engine --calibrate`: measure what the simulated engine needs to know, fit it, store it.

Everything is asked of a real engine over its protocol, with all contexts at work. Prompts of several lengths, one a
context, tell what reading takes: from the start of a prompt to its first token. As many sequences in each context as
there are points on the curve tell what a step takes; with long prompts, what cells take.

A step is timed by the request that starts last: from its first token to its last one all others run, and nobody's
prompt is read. Everything is repeated in turn, so that a machine that slows down slows all of it; medians count.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import msgspec

from coordinator.bench_engine import BenchEngine, first_engine, say
from coordinator.bench_load import Load
from coordinator.config import JobConfig
from coordinator.setup import Setup, prepare
from coordinator.versions import package_versions
from scheduling.backends import shown
from scheduling.calibration import DecodeSample, ReadSample, Residual, fit, residuals
from scheduling.errors import EXIT_OK, ConfigError
from scheduling.requests import Sampling
from scheduling.servicetime import Measured, ServiceTimes, service_times_json
from storage.files import OsDisk, replace_file
from workers.protocol import EngineConfig, Job

CTX_TOKENS = 1024
"""Tokens that a slot holds, if the user does not say."""
SHORT_PROMPT_TOKENS = 8
PROMPT_TOKENS = (32, 128, 512, 2048, 8192)
STEPS = 12
"""Steps over which the time of one is taken."""
LONG_READ_S = 6.0
"""Reading long prompts in several slots at once shall not take longer."""


@dataclass(frozen=True, slots=True)
class Series:
    """What is asked: `rows` requests in each context, of which the last one is timed for `steps` steps.

    `read_s` and `step_s`: how long its prompt took and each of its steps, once for every repeat.
    """

    rows: int
    prompt_tokens: int
    steps: int
    read_s: list[float] = field(default_factory=list)
    step_s: list[float] = field(default_factory=list)

    def jobs(self, contexts: int, sampling: Sampling, vocab_tokens: int, seed: int) -> list[Job]:
        """The timed one comes last. The others go on for longer than it can be behind."""
        requests, most = self.rows * contexts, max(1, 2 * self.steps)
        load = Load(
            requests=requests, prompt_tokens=self.prompt_tokens, output_tokens=most, output_tokens_max=most,
            sampling=sampling, seed=seed,
        )  # fmt: skip
        *others, timed = load.jobs(vocab_tokens, 0)
        fewer = msgspec.structs.replace(timed.request.sampling, max_tokens=self.steps + 1)
        request = msgspec.structs.replace(timed.request, sampling=fewer)
        return [*others, msgspec.structs.replace(timed, request=request)]


class Calibration:
    """Measures one engine that runs. `series` holds what came out."""

    def __init__(self, bench: BenchEngine, engine: EngineConfig, sampling: Sampling) -> None:
        longest = engine.ctx_tokens - 2 * STEPS
        if longest <= SHORT_PROMPT_TOKENS:
            raise ConfigError(f"--ctx {engine.ctx_tokens}: it takes {2 * STEPS + SHORT_PROMPT_TOKENS + 1} or more")
        lengths = [tokens for tokens in PROMPT_TOKENS if tokens < longest]
        self._bench, self._engine, self._sampling = bench, engine, sampling
        self._long = Series(1, longest, STEPS)
        self._short = [Series(rows, SHORT_PROMPT_TOKENS, STEPS) for rows in row_counts(engine)]
        self.series = [*(Series(1, tokens, 0) for tokens in lengths), self._long, *self._short]
        self._asked = 0
        self._choosing_s, self._chosen = 0.0, 0

    def run(self, repeats: int) -> None:
        """Measure everything `repeats` times."""
        self._ask(Series(self._short[-1].rows, SHORT_PROMPT_TOKENS, STEPS))  # warms up
        for repeat in range(repeats):
            for series in self.series:
                self._ask(series)
            if repeat == 0 and (rows := self._rows_of_long_prompts()) > 1:
                self.series.append(Series(rows, self._long.prompt_tokens, STEPS))
                self._ask(self.series[-1])
            step_ms = 1e3 * self._short[0].step_s[-1]
            say(f"repeat {repeat + 1} of {repeats}: a step of one sequence took {step_ms:.2f} ms")

    @property
    def choose_row_s(self) -> float:
        return self._choosing_s / max(1, self._chosen)

    def decodes(self) -> list[DecodeSample]:
        """Medians of all steps."""
        return [
            DecodeSample(series.rows, series.prompt_tokens + series.steps // 2, median(series.step_s))
            for series in self.series
            if series.steps
        ]

    def reads(self) -> list[ReadSample]:
        """Medians of all prompts that were alone in their context."""
        return [ReadSample(series.prompt_tokens, median(series.read_s)) for series in self.series if series.rows == 1]

    def _rows_of_long_prompts(self) -> int:
        """The most sequences of the curve whose long prompts are read in time."""
        return max(one.rows for one in self._short if one.rows == 1 or one.rows * self._long.read_s[0] <= LONG_READ_S)

    def _ask(self, series: Series) -> None:
        jobs = series.jobs(self._engine.contexts, self._sampling, self._bench.loaded.vocab_tokens, self._asked)
        self._asked += 1
        done = self._bench.run(jobs)
        timed = next(answer for answer in done.answers if answer.key == jobs[-1].key)
        series.read_s.append(timed.ttft_s - timed.queue_s)
        if series.steps:
            series.step_s.append((timed.e2e_s - timed.ttft_s) / series.steps)
        self._choosing_s += done.sample_s
        self._chosen += done.output_tokens


def row_counts(engine: EngineConfig) -> list[int]:
    """Points of the curve: 1, 2, 4, ... and what the slots of a context are."""
    most = max(1, engine.slots // engine.contexts)
    return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]


def run_calibrate(config: JobConfig, sampling: Sampling, *, repeats: int, output: Path | None, as_json: bool) -> int:
    """Measure, fit, store in `output` and print. Raises UserError or EngineError if it cannot be done."""
    if repeats < 1:
        raise ConfigError(f"--repeats is {repeats}: it must be 1 or more")
    setup = prepare(config)
    if setup.problem is not None:
        raise setup.problem
    path = output or Path(f"{setup.model_name}.service-times.json")
    if not path.parent.is_dir():
        raise ConfigError(f"{path} cannot be written: there is no folder {path.parent}")
    engine = first_engine(setup)
    bench = BenchEngine(engine)
    try:
        say(f"ready after {bench.ready_s:.1f} s; warming up")
        calibration = Calibration(bench, engine, sampling)
        calibration.run(repeats)
    finally:
        bench.close()
    decodes, reads = calibration.decodes(), calibration.reads()
    times = fit(_measured(setup, engine, bench), decodes, reads, calibration.choose_row_s)
    try:
        replace_file(OsDisk(), path, service_times_json(times))
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror or error}") from None
    left = residuals(times, decodes, reads)
    if as_json:
        from coordinator.values import print_json

        print_json(_as_data(times, left, path))
    else:
        _print_fit(times, left, path)
    return EXIT_OK


def _measured(setup: Setup, engine: EngineConfig, bench: BenchEngine) -> Measured:
    loaded = bench.loaded
    shape = setup.model.shape
    cell_bytes = 0 if shape is None else shape.token_bytes(engine.cache_type_k, engine.cache_type_v)
    gpus = [gpu.name for gpu in shown(setup.host.backends, engine.device_mask, setup.host.gpus)]
    return Measured(
        model=setup.model_name, model_digest=setup.fingerprint, model_desc=loaded.model_desc,
        model_bytes=loaded.model_bytes, cell_bytes=cell_bytes, backend=loaded.backend,
        device=", ".join(gpus) or "CPU", llama_cpp_python=package_versions()["llama-cpp-python"],
        slots=engine.slots, contexts=engine.contexts, ctx_tokens=engine.ctx_tokens, batch_tokens=engine.batch_tokens,
        ubatch_tokens=engine.ubatch_tokens, threads=engine.threads, steady=loaded.backend != "CPU",
    )  # fmt: skip


def _as_data(times: ServiceTimes, left: list[Residual], path: Path) -> dict[str, Any]:
    rows = [
        {"what": one.what, "measured_s": one.measured_s, "fitted_s": one.fitted_s, "error": one.error} for one in left
    ]
    return {"file": str(path), "service_times": msgspec.to_builtins(times), "residuals": rows}


def _print_fit(times: ServiceTimes, left: list[Residual], path: Path) -> None:
    measured = times.measured
    print(f"{measured.model_desc} on {measured.device}, {measured.slots} slots, {measured.contexts} at work at once")
    steps = ", ".join(
        f"{rows}: {1e3 * seconds:.2f}" for rows, seconds in zip(times.decode_rows, times.decode_s, strict=True)
    )
    print(f"  a step of so many sequences, ms      {steps}")
    print(f"  a pass that reads, ms                {1e3 * times.read_pass_s:.2f}")
    print(f"  each token that is read, ms          {1e3 * times.read_token_s:.4f}")
    print(f"  each cell, decoding / reading, µs    {1e6 * times.decode_cell_s:.4f} / {1e6 * times.read_cell_s:.4f}")
    print(f"  each token that is chosen, ms        {1e3 * times.choose_row_s:.4f}")
    print(f"  {'measured, and what the fit says':36} {'ms':>10} {'ms':>10}  error")
    for one in left:
        print(f"    {one.what:34} {1e3 * one.measured_s:10.2f} {1e3 * one.fitted_s:10.2f} {100 * one.error:+5.1f} %")
    print(f"stored in {path}")
