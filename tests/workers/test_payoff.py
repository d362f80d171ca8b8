from __future__ import annotations

import pytest

from workers.payoff import AGE_MAX, AGE_PLAIN_MAX, Odds, PassTimes, best_length, expected_tokens, seconds_of

LENGTHS = (1, 2, 4, 8)
FLAT = [(0, 1.0), (1, 1.0), (2, 1.0), (4, 1.0), (8, 1.1)]
STEEP = [(0, 1.0), (1, 2.0), (2, 3.0), (4, 5.0), (8, 9.0)]


def best(known: list[tuple[int, float]], *chances: float, rooms: int = 100, drafting_s: float = 0.0) -> int:
    return best_length(
        LENGTHS,
        chances,
        [rooms] * len(chances),
        lambda length: min(length, rooms) * len(chances),
        known,
        lambda length: drafting_s * length,
    )


def test_expected_tokens_are_the_sum_of_the_chances_that_all_before_were_right() -> None:
    assert expected_tokens(0.5, 3) == pytest.approx(1 + 0.5 + 0.25 + 0.125)
    assert expected_tokens(0.0, 5) == 1.0
    assert expected_tokens(1.0, 5) == 6.0
    assert expected_tokens(0.9, 0) == pytest.approx(1.0)


def test_drafts_are_as_long_as_rows_are_cheap_and_tokens_likely() -> None:
    assert best(FLAT, 0.9) == 8
    assert best(FLAT, 0.1) == 4
    assert best(STEEP, 0.9) == 0
    assert best([(0, 1.0), (1, 1.6), (2, 2.2), (4, 3.4), (8, 5.8)], 0.9) in (1, 2, 4)
    assert best([(0, 1.0), (1, 1.6), (2, 2.2), (4, 3.4), (8, 5.8)], 0.5) == 0


def test_drafts_that_take_long_to_make_are_shorter() -> None:
    assert best(FLAT, 0.8, drafting_s=0.1) == 4
    assert best(FLAT, 0.8, drafting_s=0.7) == 1
    assert best(FLAT, 0.8, drafting_s=1.0) == 0


def test_one_sequence_that_has_no_draft_does_not_count() -> None:
    assert best(FLAT, 0.9, 0.0) > 0
    assert best([(0, 1.0), (1, 1.5), (8, 3.0)], 0.9, 0.0, 0.0, 0.0) == 0


def test_nothing_is_drafted_before_a_plain_pass_has_been_measured() -> None:
    assert best([], 0.9) == 0
    assert best([(2, 1.0)], 0.9) == 0


def test_more_rows_are_tried_one_length_at_a_time() -> None:
    assert best([(0, 1.0)], 0.9) == 1
    assert best([(0, 1.0), (1, 1.1)], 0.9) == 2
    assert best([(0, 1.0), (1, 2.5)], 0.6) == 0
    assert best([(0, 1.0), (1, 1.1), (2, 9.0)], 0.9) == 1


def test_times_between_those_that_are_known_are_in_proportion() -> None:
    known = [(0, 1.0), (4, 3.0), (8, 4.0)]
    assert [seconds_of(extra, known) for extra in (0, 1, 4, 6, 8, 20)] == [1.0, 1.5, 3.0, 3.5, 4.0, 4.0]


def test_the_first_pass_of_a_shape_and_one_that_was_held_up_are_no_measure() -> None:
    times = PassTimes()
    times.add(1, 0, 50.0)
    assert times.known(1) == []
    for seconds in (1.0, 1.2, 9.0):
        times.add(1, 0, seconds)
    times.add(2, 0, 7.0)
    assert times.known(1) == [(0, 1.2)]
    assert times.known(2) == []


def test_what_was_measured_long_ago_is_measured_anew() -> None:
    times = PassTimes()
    for _ in range(3):
        times.add(1, 7, 5.0)
    for _ in range(AGE_MAX):
        times.add(1, 0, 1.0)
    assert times.known(1) == [(0, 1.0)]
    times.add(1, 7, 3.0)
    times.add(1, 7, 2.0)
    assert times.known(1) == [(0, 1.0), (7, 2.0)]


def test_a_plain_pass_is_measured_again_before_others_are() -> None:
    times = PassTimes()
    for _ in range(2):
        times.add(1, 0, 1.0)
        times.add(1, 7, 2.0)
    for _ in range(AGE_PLAIN_MAX):
        times.add(1, 7, 2.0)
    assert times.known(1) == [(7, 2.0)]
    times.add(1, 0, 1.5)
    assert times.known(1) == [(0, 1.5), (7, 2.0)]


def test_odds_follow_what_was_right_for_a_request_and_begin_with_what_was_for_all() -> None:
    odds = Odds((0.5, 0.9))
    assert (odds.chance(1, 0), odds.chance(1, 1)) == (0.5, 0.9)
    for _ in range(20):
        odds.checked(1, 0, 5, 5)
        odds.checked(2, 0, 0, 5)
    assert odds.chance(1, 0) > 0.9
    assert odds.chance(2, 0) < 0.4
    assert odds.chance(2, 0) < odds.chance(3, 0) < odds.chance(1, 0)
    assert odds.chance(3, 1) == 0.9


def test_only_tokens_up_to_the_first_wrong_one_are_looked_at() -> None:
    one, other = Odds((0.5,)), Odds((0.5,))
    one.checked(1, 0, 2, 3)
    other.checked(1, 0, 2, 15)
    assert one.chance(1, 0) == other.chance(1, 0)


def test_what_never_pays_is_thought_likely_again_after_a_while() -> None:
    odds = Odds((0.7,))
    for _ in range(50):
        odds.checked(1, 0, 0, 5)
    low = odds.chance(1, 0)
    assert low < 0.1
    for _ in range(400):
        odds.unused(1, 0)
    assert odds.chance(1, 0) > 0.65


def test_requests_that_have_ended_are_forgotten() -> None:
    odds = Odds((0.5,))
    odds.checked(1, 0, 5, 5)
    odds.keep([2])
    odds.chance(2, 0)
    odds.keep([2])
    assert odds.chance(1, 0) == odds.chance(2, 0)
