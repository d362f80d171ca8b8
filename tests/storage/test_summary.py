"""Figures for people: failed requests are in no latency, percentiles know what they rest on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from scheduling.errors import BugError
from storage.summary import Quantile, Sums, check_sums, summarise
from tests.storage.samples import rows


def test_percentiles_are_those_of_the_merged_data_within_a_bucket() -> None:
    chunks = [rows(700, 1), rows(300, 2), rows(0)]
    summary = summarise(iter(chunks))
    assert (summary.ok, summary.failed) == (1000, 0)
    together = np.concatenate(chunks)
    for name in ("queue_s", "ttft_s", "tpot_s", "e2e_s"):
        for quantile in summary.quantiles(name):
            exact = float(np.quantile(together[name], quantile.q, method="inverted_cdf"))
            assert quantile.value_s == pytest.approx(exact, rel=0.012)
            assert quantile.samples == 1000
        assert summary.mean_s(name) == pytest.approx(float(together[name].mean()))


def test_failed_requests_count_but_are_in_no_latency() -> None:
    summary = summarise([rows(100, failed=40)])
    assert (summary.ok, summary.failed) == (60, 40)
    assert (summary.prompt_tokens, summary.cached_tokens) == (1000, 400)
    assert summary.histograms["e2e_s"].count == 60
    assert summary.quantiles("e2e_s")[2].value_s < 100


def test_smallest_and_largest_time_are_exact_over_chunks_and_missing_without_answers() -> None:
    first, second = rows(10), rows(5, failed=1)
    first["e2e_s"], second["e2e_s"] = np.linspace(2.0, 3.0, 10), np.array([1.0, 2.0, 2.5, 7.0, 5.0])
    second["ok"] = [0, 1, 1, 1, 1]
    summary = summarise([rows(0), first, second])
    assert (summary.shortest_s, summary.longest_s) == (2.0, 7.0)
    assert math.isnan(summarise([rows(3, failed=3)]).shortest_s)


def test_undefined_values_are_left_out_of_their_own_latency_only() -> None:
    table = rows(10)
    table["tpot_s"][:4] = np.nan
    summary = summarise([table])
    assert summary.histograms["tpot_s"].count == 6
    assert summary.histograms["e2e_s"].count == 10


def test_nothing_measured_is_nan_with_no_samples() -> None:
    summary = summarise([])
    assert summary.ok == 0
    assert all(math.isnan(quantile.value_s) and quantile.samples == 0 for quantile in summary.quantiles("ttft_s"))
    assert math.isnan(summary.mean_s("ttft_s"))


def test_a_percentile_is_supported_once_a_sample_lies_beyond_it() -> None:
    assert Quantile(0.99, 1.0, 100).supported
    assert not Quantile(0.99, 1.0, 99).supported
    assert Quantile(0.95, 1.0, 20).supported
    assert not Quantile(0.5, math.nan, 0).supported


def test_equal_sums_pass_and_different_ones_name_both_figures() -> None:
    recorded = summarise([rows(7, failed=1)]).sums
    check_sums(recorded, Sums(7, 1, 70, 28, 35))
    with pytest.raises(BugError, match=r"failed: 1 recorded, 2 gathered; output_tokens: 35 recorded, 36 gathered"):
        check_sums(recorded, Sums(7, 2, 70, 28, 36))
