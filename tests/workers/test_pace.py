"""How much is read in a step while others decode."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.pace import READ_TOKENS_MIN, SHORT_TOKENS, STRETCH, TOGETHER_TOKENS, WORTH, Pace


def paced(step_s: float, token_s: float, batch_tokens: int = 2048, steps: int = 50) -> Pace:
    """After some steps on a machine with these times."""
    pace = Pace(batch_tokens)
    for _ in range(steps):
        pace.observe(8, 0, step_s)
        read = pace.allowed(8)
        pace.observe(8, read, step_s + read * token_s)
    return pace


def test_without_others_that_wait_a_whole_batch_is_read() -> None:
    pace = paced(1e-2, 1e-3)
    assert pace.allowed(0) == 2048
    assert pace.allowed(8) < 2048


def test_before_anything_was_measured_a_whole_batch_is_read() -> None:
    assert Pace(512).allowed(8) == 512


def test_where_no_token_has_a_price_yet_few_are_read_at_first() -> None:
    """Only questions of a line have come. On a processor 2,000 tokens at once were a gap of a minute."""
    pace = Pace(4096)
    pace.observe(0, 12, 0.1)
    pace.observe(2, 0, 0.05)
    assert pace.allowed(2) == SHORT_TOKENS
    assert pace.allowed(2, 1) == TOGETHER_TOKENS, "what a GPU reads in a tenth of a second"
    pace.observe(2, SHORT_TOKENS, 0.05 + SHORT_TOKENS * 0.01)
    assert pace.allowed(2) == READ_TOKENS_MIN


def test_steps_that_only_read_tell_what_a_token_costs_but_nothing_about_those_that_decode() -> None:
    pace = Pace(512)
    pace.observe(0, 500, 0.5)
    pace.observe(0, 1, 0.02)
    assert pace.allowed(8) == 512
    pace.observe(8, 0, 0.05)
    assert pace.allowed(8) == (STRETCH - 1.0) * 0.05 / 0.001 // READ_TOKENS_MIN * READ_TOKENS_MIN


@given(st.floats(1e-4, 1.0), st.floats(1e-6, 1e-2))
def test_a_step_that_reads_is_at_most_so_much_longer(step_s: float, token_s: float) -> None:
    allowed = paced(step_s, token_s).allowed(8)
    assert READ_TOKENS_MIN <= allowed <= 2048
    if allowed > READ_TOKENS_MIN:
        assert step_s + allowed * token_s <= STRETCH * step_s * 1.01
    if allowed < 2048:
        assert step_s + (allowed + READ_TOKENS_MIN) * token_s >= STRETCH * step_s * 0.98


def priced(step_s: float, pass_s: float, token_s: float) -> int:
    """Tokens that are read in a step where a pass that reads takes `pass_s`, and `token_s` for each token."""
    pace = Pace(4096)
    pace.observe(0, 4000, pass_s + 4000 * token_s)
    for _ in range(400):
        pace.observe(16, 0, step_s)
        read = pace.allowed(16, 1)
        pace.observe(16, read, step_s + pass_s + read * token_s)
    return pace.allowed(16, 1)


def test_where_a_pass_has_a_price_of_its_own_it_is_not_paid_for_a_few_tokens() -> None:
    """The price of a pass is all that gaps allow, or more: as many are read as take half a step's time when
    nobody decodes."""
    step_s, pass_s, token_s = 0.012, 0.040, 0.00005
    whole_s = (pass_s + 4000 * token_s) / 4000
    expected = WORTH * step_s / whole_s // READ_TOKENS_MIN * READ_TOKENS_MIN
    assert priced(step_s, pass_s, token_s) == expected >= 96


def test_a_price_that_gaps_allow_leaves_as_many_as_fit() -> None:
    step_s, pass_s, token_s = 0.012, 0.0196, 0.000019
    read = priced(step_s, pass_s, token_s)
    assert step_s + pass_s + read * token_s <= (STRETCH + 0.05) * step_s
    assert read >= 200


def test_a_machine_that_becomes_slower_is_noticed() -> None:
    pace = paced(1e-2, 1e-4)
    assert pace.allowed(8) >= 224
    for _ in range(60):
        pace.observe(8, 0, 1e-2)
        read = pace.allowed(8)
        pace.observe(8, read, 1e-2 + read * 5e-4)
    assert 32 <= pace.allowed(8) <= 64


def test_a_machine_on_which_a_token_becomes_a_hundred_times_as_dear_is_noticed() -> None:
    pace = paced(1e-2, 1e-5)
    before = pace.allowed(8)
    for _ in range(60):
        pace.observe(8, 0, 1e-2)
        pace.observe(8, 100, 1e-2 + 100 * 1e-3)
    assert pace.allowed(8) < before / 10
    read = beside_others(pace, 1e-2, 0.0, 1e-3, 60)
    assert read[-20:] == [READ_TOKENS_MIN] * 20


def test_the_last_piece_of_a_prompt_is_no_other_machine() -> None:
    """A 1B on a GPU: 250 tokens make a step of 4 ms 10 ms longer, which is 20 times what 33 take in a whole batch, but
    33 only 5 ms."""
    pace = Pace(2048)
    pace.observe(0, 2000, 2000 * 12e-6)
    pace.observe(32, 0, 0.004)
    for _ in range(40):
        pace.observe(32, 250, 0.004 + 0.0082 + 250 * 12e-6)
    before = pace.allowed(32, 1)
    pace.observe(32, 33, 0.004 + 0.0044 + 33 * 12e-6)
    assert pace.allowed(32, 1) >= before >= 160


def beside_others(pace: Pace, step_s: float, pass_s: float, token_s: float, steps: int) -> list[int]:
    """How much of a long prompt is read in each of so many steps in which 32 others decode."""
    read = []
    for _ in range(steps):
        read.append(pace.allowed(32, 1))
        pace.observe(32, read[-1], step_s + pass_s + read[-1] * token_s)
    return read


def test_few_tokens_that_are_dear_do_not_keep_it_from_reading_more() -> None:
    """What 33 tokens took on a GPU, 15 ms of 21, let 46 be read: in multiples of 32 no more."""
    pace = Pace(2048)
    for _ in range(20):
        pace.observe(0, 2000, 2000 / 14_000)
    pace.observe(32, 0, 0.010)
    for _ in range(5):
        pace.observe(32, 33, 0.010 + 0.015 + 33 / 14_000)
    beside_others(pace, 0.010, 0.015, 1 / 14_000, 60)
    assert 128 <= pace.allowed(32, 1) <= 160


@pytest.mark.parametrize("decoding", [0, 3])
def test_where_only_short_prompts_have_been_read_a_long_one_gets_as_much_as_gaps_allow(decoding: int) -> None:
    """A token of theirs took 0.49 ms on this GPU, most of it the pass's: in multiples of 32 no more was allowed."""
    step_s, pass_s, token_s = 0.010, 0.015, 1 / 14_000
    pace = Pace(2048)
    pace.observe(1, 0, step_s)
    for _ in range(20):
        pace.observe(decoding, 33, (step_s if decoding else 0) + pass_s + 33 * token_s)
        pace.observe(3, 0, step_s)
    read = beside_others(pace, step_s, pass_s, token_s, 200)
    assert 120 <= sum(read[-20:]) / 20 <= 160
    assert sum(read[:40]) >= 2500, "nor does it take for ever"
    assert max(read) <= 192


def test_short_prompts_later_on_do_not_make_a_token_dear() -> None:
    step_s, pass_s, token_s = 0.010, 0.015, 1 / 14_000
    pace = Pace(2048)
    pace.observe(0, 2000, pass_s + 2000 * token_s)
    pace.observe(1, 0, step_s)
    for _ in range(60):
        pace.observe(0, 33, pass_s + 33 * token_s)
    beside_others(pace, step_s, pass_s, token_s, 60)
    assert pace.allowed(32, 1) >= 128


def test_a_first_step_that_was_slow_does_not_make_reading_free() -> None:
    """What is read beside one seems to cost nothing then: whole batches would be read for ever."""
    pace = Pace(2048)
    pace.observe(1, 0, 0.5)
    pace.observe(1, 20, 0.02)
    for _ in range(60):
        pace.observe(1, 0, 0.01)
    pace.observe(1, 2048, 0.01 + 2048 * 1e-4)
    for _ in range(60):
        read = pace.allowed(1)
        pace.observe(1, read, 0.01 + read * 1e-4)
    assert pace.allowed(1) <= 288


def test_a_step_that_was_held_up_by_something_else_is_little_weighed() -> None:
    pace = paced(1e-2, 1e-4)
    before = pace.allowed(8)
    pace.observe(8, before, 5.0)
    assert pace.allowed(8) >= before - 2 * READ_TOKENS_MIN


@pytest.mark.parametrize("before", [0, 50])
def test_a_step_that_only_decodes_and_was_held_up_does_not_make_reading_free(before: int) -> None:
    """The machine slept, say, or a first step loaded something; then every step reads."""
    usual = paced(1e-2, 1e-4).allowed(8)
    pace = paced(1e-2, 1e-4, steps=before)
    pace.observe(8, 0, 5.0)
    if not before:
        pace.observe(8, 0, 1e-2)
    read = []
    for _ in range(50):
        read.append(pace.allowed(8))
        pace.observe(8, read[-1], 1e-2 + read[-1] * 1e-4)
    assert sum(read[-20:]) <= 20 * 1.6 * usual


def test_the_more_wait_to_be_read_the_more_is_read() -> None:
    pace = paced(1e-2, 1e-3)
    waiting = [pace.allowed(64, count) for count in (0, 1, 4, 7, 13, 21)]
    assert waiting[0] == waiting[1] == waiting[2]
    assert waiting[2:] == sorted(set(waiting[2:]))
    assert waiting[-1] == 2048


@given(st.integers(1, 100))
def test_one_alone_never_fills_a_batch_for_being_waited_for(decoding: int) -> None:
    pace = paced(1e-2, 1e-3)
    assert pace.allowed(decoding, 1) == pace.allowed(decoding)


def test_short_prompts_are_not_cut() -> None:
    pace = paced(1e-2, 1e-3)
    alone = pace.allowed(1000)
    assert pace.allowed(1000, 1, 255) == 255 > alone
    assert pace.allowed(1000, 1, 0) == alone
    assert pace.allowed(1000, 8, 8 * 127) == 8 * 127
    assert pace.allowed(1000, 40, 40 * 127) == TOGETHER_TOKENS


def test_a_first_step_that_was_slow_does_not_end_it() -> None:
    """Every later one reads, and is faster: no step without reading is seen again."""
    pace = Pace(2048)
    pace.observe(0, 512, 0.1)
    pace.observe(64, 0, 0.5)
    for _ in range(10_000):
        pace.observe(64, 16, 0.02)
    assert pace.allowed(64) == 2048
    assert pace.allowed(64, 64, 640) == 2048
