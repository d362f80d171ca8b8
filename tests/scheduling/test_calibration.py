"""The fit finds the times that samples were made from, and stays sensible where they are noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduling.calibration import DecodeSample, ReadSample, fit, not_negative, residuals, rising
from scheduling.errors import ConfigError
from scheduling.servicetime import EXAMPLE, ServiceTimes

MEASURED = EXAMPLE.measured
DECODES = ((1, 14), (2, 14), (4, 14), (8, 14), (1, 1000), (4, 1000))
READS = (32, 128, 512, 1000)


def samples(times: ServiceTimes, noise: float = 0.0, seed: int = 0) -> tuple[list[DecodeSample], list[ReadSample]]:
    random = np.random.default_rng(seed)
    factors = 1.0 + noise * random.uniform(-1, 1, len(DECODES) + len(READS))
    decodes = [
        DecodeSample(rows, cells, times.decode_step_s(rows, cells) * factor)
        for (rows, cells), factor in zip(DECODES, factors, strict=False)
    ]
    reads = [
        ReadSample(tokens, times.prefill_s(tokens) * factor)
        for tokens, factor in zip(READS, factors[len(DECODES) :], strict=True)
    ]
    return decodes, reads


def test_times_are_found_again_from_what_they_say() -> None:
    decodes, reads = samples(EXAMPLE)
    found = fit(MEASURED, decodes, reads, EXAMPLE.choose_row_s)
    assert found.decode_rows == EXAMPLE.decode_rows
    assert found.decode_s == pytest.approx(EXAMPLE.decode_s)
    assert found.read_pass_s == pytest.approx(EXAMPLE.read_pass_s)
    assert found.read_token_s == pytest.approx(EXAMPLE.read_token_s)
    assert found.read_cell_s == pytest.approx(EXAMPLE.read_cell_s)
    assert found.decode_cell_s == pytest.approx(EXAMPLE.decode_cell_s)
    assert all(abs(one.error) < 1e-6 for one in residuals(found, decodes, reads))


@given(st.integers(0, 1000), st.floats(0.0, 0.9))
def test_noise_never_makes_a_time_negative_or_a_larger_step_quicker(seed: int, noise: float) -> None:
    decodes, reads = samples(EXAMPLE, noise, seed)
    fit(MEASURED, decodes, reads, EXAMPLE.choose_row_s)  # what it makes is checked when it is made


def test_a_little_noise_is_a_little_error() -> None:
    decodes, reads = samples(EXAMPLE, 0.05)
    found = fit(MEASURED, decodes, reads, EXAMPLE.choose_row_s)
    assert found.request_s(200, 100, 8) == pytest.approx(EXAMPLE.request_s(200, 100, 8), rel=0.1)
    assert max(abs(one.error) for one in residuals(found, decodes, reads)) < 0.15


def test_residuals_name_what_was_measured_and_by_how_much_the_fit_is_off() -> None:
    [prompt, step] = residuals(EXAMPLE, [DecodeSample(2, 10, 1.0)], [ReadSample(32, 1.0)])
    assert (prompt.what, step.what) == ("prompt of 32", "step of 2, 10 cells each")
    assert step.error == pytest.approx(EXAMPLE.decode_step_s(2, 10) - 1.0)


@pytest.mark.parametrize(
    ("decodes", "reads"),
    [([], [ReadSample(1, 1.0), ReadSample(2, 1.0)]), ([DecodeSample(1, 1, 1.0)], [ReadSample(5, 1.0)] * 2)],
)
def test_too_few_samples_are_refused(decodes: list[DecodeSample], reads: list[ReadSample]) -> None:
    with pytest.raises(ConfigError, match="too little was measured"):
        fit(MEASURED, decodes, reads, 0.0)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_rising_keeps_what_rises_and_the_sum_of_all(values: list[float]) -> None:
    found = rising(values)
    assert (np.diff(found) >= -1e-9).all()
    assert found.sum() == pytest.approx(sum(values))
    assert rising(sorted(values)) == pytest.approx(sorted(values))


def test_not_negative_leaves_out_what_would_be_negative() -> None:
    columns = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert not_negative(columns, np.array([3.0, 2.0, 1.0])) == pytest.approx([2.0, 0.0])
    assert not_negative(columns, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])
    assert not_negative(columns, -np.ones(3)) == pytest.approx([0.0, 0.0])
