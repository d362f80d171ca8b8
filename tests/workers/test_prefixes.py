"""Which slot a prompt gets: over slot arrays alone, and what comes of it over the fake decoder."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.workers.engine_fakes import EOG, job, said_after
from tests.workers.test_stepper import Rig, only
from workers.passes import mixed_pass, trim_idle
from workers.prefixes import COMMON_TOKENS_MIN, Place, Prefixes
from workers.protocol import Answer, Job
from workers.shape import Shape
from workers.slots import NOBODY, Ints, SlotArrays

KEEPS = Shape(keeps=True, copy_tokens=20)
STEADY = Shape(steady=True, pad_tokens=8, moves=True, patience=0.6, keeps=True, copy_tokens=20)
SHAPES = pytest.mark.parametrize("shape", [KEEPS, STEADY], ids=["mixed", "steady"])
SYSTEM = tuple(range(1, 41))
"""What prompts have in common: 40 tokens."""


def tokens(*parts: tuple[int, ...]) -> Ints:
    return np.array([token for part in parts for token in part], np.int32)


class Table:
    """Slots, and prompts put into them as `Seating` does it."""

    def __init__(self, count: int = 8, shape: Shape = KEEPS) -> None:
        self.slots = SlotArrays(count, 400, shape)
        self.prefixes = Prefixes(self.slots)

    def seat(self, prompt: Ints) -> Place:
        place = self.prefixes.place(prompt)
        self.slots.take(prompt, 4, slot=place.slot, keep=place.keep)
        self.prefixes.taken(place)
        return place

    def read(self, *slots: int) -> None:
        """All tokens of these slots are in cells, but the last."""
        for slot in slots:
            self.slots.fed[slot] = self.slots.length[slot] - 1

    def end(self, *slots: int) -> None:
        for slot in slots:
            self.slots.release(slot)

    def ran(self, *prompts: Ints) -> list[Place]:
        """These run at the same time and end."""
        places = [self.seat(prompt) for prompt in prompts]
        for place in places:
            self.slots.donor[place.slot] = NOBODY
            self.read(place.slot)
        self.end(*(place.slot for place in places))
        return places


def unlike(number: int, size: int = 60) -> Ints:
    """A prompt that has nothing in common with others of other numbers."""
    return np.arange(1000 * number, 1000 * number + size, dtype=np.int32)


# ---------------------------------------------------------------- where a prompt goes


def test_a_free_slot_that_begins_like_the_prompt_is_taken_as_it_is() -> None:
    table = Table()
    table.ran(unlike(1), tokens(SYSTEM, (50, 51, 52)), unlike(2))
    assert table.seat(tokens(SYSTEM, (50, 99, 98))) == Place(1, keep=41)
    assert table.slots.fed[1] == table.slots.cached[1] == 41


def test_the_last_token_of_a_prompt_is_always_read() -> None:
    table = Table()
    table.ran(tokens(SYSTEM, (50, 51, 52)))
    assert table.seat(tokens(SYSTEM)) == Place(0, keep=len(SYSTEM) - 1)


def test_output_is_kept_too_for_a_conversation_that_goes_on() -> None:
    table = Table()
    place = table.seat(tokens(SYSTEM))
    table.read(place.slot)
    for token in (60, 61, 62):
        table.slots.fed[place.slot] += 1
        table.slots.put(np.array([place.slot]), np.array([token], np.int32), 0.0)
    table.end(place.slot)
    # The last output token was never fed.
    assert table.seat(tokens(SYSTEM, (60, 61, 62, 70, 71))).keep == len(SYSTEM) + 2


def test_the_longest_common_beginning_wins_and_the_smallest_slot_among_equals() -> None:
    table = Table()
    table.ran(tokens(SYSTEM[:30], (90,) * 10), tokens(SYSTEM, (91,) * 10), tokens(SYSTEM, (92,) * 10))
    assert table.seat(tokens(SYSTEM, (93,) * 10)) == Place(1, keep=40)


def test_less_than_is_worth_looking_for_is_not_reused() -> None:
    table = Table()
    table.ran(tokens(SYSTEM))
    table.slots.used[1] = True  # nobody takes turns where others run
    table.slots._busy = 1
    assert table.seat(tokens(SYSTEM[: COMMON_TOKENS_MIN - 1], (99,) * 20)) == Place(0)


@pytest.mark.parametrize("size", [1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 192, 193, 300])
def test_common_beginnings_are_found_to_the_token(size: int) -> None:
    table = Table()
    long = unlike(1, 301)
    table.ran(long)
    parted = np.concatenate([long[:size], np.full(40, 7, np.int32)])
    keep = size if size >= COMMON_TOKENS_MIN else 0
    place = table.prefixes.place(parted)
    assert max(place.keep, place.shared) == (keep if keep - place.keep >= 20 or place.keep else 0)
    assert table.prefixes._common(parted, parted.size - 1)[0] == keep


def test_without_reuse_the_smallest_slot_is_taken_and_nothing_kept() -> None:
    table = Table(shape=Shape())
    table.ran(tokens(SYSTEM, (1,)), tokens(SYSTEM, (2,)))
    assert table.slots.kept.tolist() == [0] * 8
    assert table.seat(tokens(SYSTEM, (2,))) == Place(0)


# ---------------------------------------------------------------- donors


def test_what_a_busy_slot_has_is_copied_where_that_is_worth_it() -> None:
    table = Table()
    table.seat(tokens(SYSTEM, (50,)))
    table.read(0)
    assert table.seat(tokens(SYSTEM, (60,))) == Place(1, donor=0, shared=40)
    assert table.prefixes.settled() == [1]
    assert table.seat(tokens(SYSTEM[:19], (60,) * 20)).donor == NOBODY


def test_what_a_busy_slot_will_have_is_waited_for() -> None:
    table = Table()
    for last in range(50, 53):
        table.seat(tokens(SYSTEM, (last,)))
    assert table.slots.donor[:3].tolist() == [NOBODY, 0, 0]
    assert table.prefixes.settled() == []
    assert mixed_pass(table.slots, 100, 100).seq.tolist() == [0] * 41, "those that wait read nothing"
    assert table.prefixes.settled() == [1, 2]


def test_a_slot_that_has_nearly_as_much_now_is_better_than_one_that_will_have_more() -> None:
    table = Table()
    table.seat(tokens(SYSTEM[:35], (90,) * 9))
    table.read(0)
    table.seat(tokens(SYSTEM, (91,) * 9))
    assert table.slots.donor[1] == 0
    assert table.seat(tokens(SYSTEM, (92,))) == Place(2, donor=0, shared=35)


def test_those_whose_donor_has_ended_look_again_and_one_of_them_reads() -> None:
    table = Table()
    for last in range(50, 54):
        table.seat(tokens(SYSTEM, (last,)))
    table.end(0)
    assert table.prefixes.settled() == []
    assert table.slots.donor[:4].tolist() == [NOBODY, NOBODY, 1, 1]


def test_what_a_donor_had_when_it_ended_is_given_all_the_same() -> None:
    table = Table()
    for last in range(50, 52):
        table.seat(tokens(SYSTEM, (last,)))
    table.slots.fed[0] = 30
    table.end(0)
    assert table.prefixes.settled() == [1]
    assert (table.slots.donor[1], table.slots.awaited[1]) == (0, 30)


def test_donors_are_followed_when_they_move() -> None:
    table = Table(shape=STEADY)
    table.ran(unlike(1))
    table.slots.used[0], table.slots._busy = True, 1
    for last in range(50, 52):
        table.seat(tokens(SYSTEM, (last,)))
    assert table.slots.donor[2] == 1
    table.end(0)
    table.slots.move(1, 0)
    assert table.slots.donor[2] == 0


# ---------------------------------------------------------------- what is kept warm


def test_what_a_second_prompt_has_asked_for_is_kept_while_others_come_and_go() -> None:
    table = Table(count=4)
    table.ran(tokens(SYSTEM, (50,)))
    table.ran(tokens(SYSTEM, (51,)))
    for number in range(1, 20):
        table.ran(unlike(number), unlike(100 + number))
    assert table.seat(tokens(SYSTEM, (52,))).keep == 40


def test_of_two_copies_one_is_given_away() -> None:
    table = Table(count=2)
    table.ran(tokens(SYSTEM, (50,)), tokens(SYSTEM, (51,)))
    assert table.slots.asked_tokens.tolist() == [40, 40]
    first = table.seat(unlike(1))
    table.end(first.slot)
    assert table.seat(unlike(2)).slot == first.slot, "the last copy is kept"


def test_where_all_have_been_asked_for_the_one_that_was_asked_for_longest_ago_is_given_away() -> None:
    table = Table(count=2)
    one, other = unlike(1), unlike(2)
    for prompt in (one, other):
        for last in (7, 8):
            table.ran(np.append(prompt, np.int32(last)))
    for _ in range(2):
        table.ran(np.append(one, np.int32(9)))
    held = table.slots.tokens[:, 0].tolist()
    assert sorted(held) == [1000, 2000]
    assert table.seat(unlike(3)).slot == held.index(2000)


def test_requests_that_come_one_by_one_take_turns() -> None:
    table = Table()
    table.ran(tokens(SYSTEM, (50,)))
    for number in range(1, 4):
        table.ran(unlike(number))
    assert table.seat(tokens(SYSTEM, (51,))).keep == 40


def test_without_anything_in_common_slots_in_use_are_the_smallest() -> None:
    table = Table()
    for number in range(6):
        table.seat(unlike(number))
    table.end(1, 3)
    assert table.seat(unlike(7)).slot == 1


def test_a_steady_pass_is_not_made_wider_for_a_prefix_which_is_copied_instead() -> None:
    table = Table(count=64, shape=STEADY)
    for number in range(40):
        table.seat(unlike(number))
    table.read(*range(40))
    table.end(*range(40))
    table.slots.narrow()
    table.seat(unlike(100))
    assert table.seat(np.append(unlike(39), np.int32(7))) == Place(1, donor=39, shared=59)


# ---------------------------------------------------------------- idle rows


def test_idle_slots_keep_what_they_had_and_lose_what_means_nothing() -> None:
    slots = SlotArrays(2, 1000, STEADY)
    slots.take(unlike(1, 100), 500)
    slots.take(unlike(2, 200), 500)
    slots.fed[:] = (99, 199)
    slots.release(0)
    slots.outputs[1] = 1
    slots.fed[0] = 256  # of which 157 mean nothing
    assert trim_idle(slots).tolist() == [0]
    assert slots.held.tolist() == slots.fed.tolist() == [99, 199]


def test_an_idle_slot_is_cut_so_that_others_do_not_attend_to_more_than_they_need() -> None:
    slots = SlotArrays(2, 1000, STEADY)
    slots.take(unlike(1, 900), 500)
    slots.take(unlike(2, 200), 500)
    slots.fed[:] = (899, 199)
    slots.release(0)
    assert trim_idle(slots).tolist() == [0]
    assert slots.held[0] < 256
    slots.fed[1] = 700
    assert trim_idle(slots).tolist() == []


# ---------------------------------------------------------------- over the fake decoder


def rig(shape: Shape, slots: int = 4, batch_tokens: int = 64) -> Rig:
    return Rig(slots, 120, batch_tokens, shape=shape, reads_all=True)


def checked(rig: Rig, steps_max: int = 5000) -> dict[int, Answer]:
    """Step until nothing is left; after each step cells are what the slots say. Waiting for ever is found out."""
    slots, cells = rig.stepper._slots, rig.decoder.cells
    for _ in range(steps_max):
        if not rig.stepper.step():
            return rig.answers()
        for slot, held in enumerate(slots.held.tolist()):
            assert cells.get(slot, [])[:held] == slots.tokens[slot, :held].tolist()
            assert len(cells.get(slot, [])) == slots.fed[slot]
    raise AssertionError("some requests wait for ever")


@SHAPES
def test_a_prefix_of_requests_that_come_together_is_read_once(shape: Shape) -> None:
    run = rig(shape)
    run.submit(*(job(key, (*SYSTEM, key), max_tokens=5) for key in range(12)))
    run.meter.wake(0.0)
    answers = checked(run)
    run.meter.sleep(run.clock())
    assert {key: only(answer)[0] for key, answer in answers.items()} == {
        key: said_after((*SYSTEM, key), 5) for key in range(12)
    }
    cached = [answers[key].cached_tokens for key in range(12)]
    # While it waits a slot takes part in a steady decode pass: it reads a token of its own.
    own = 1 if shape.steady else 0
    assert cached == [0] + [40 - own] * 3 + [40] * 8
    assert sum(stats.cached_tokens for stats in run.stats) == sum(cached)
    assert sum(stats.prompt_tokens for stats in run.stats) == 12 * 41 - sum(cached)


@SHAPES
def test_choices_of_one_request_read_its_prompt_once(shape: Shape) -> None:
    run = rig(shape)
    run.submit(job(1, SYSTEM, n=4), job(2, SYSTEM, n=2))
    run.meter.wake(0.0)
    answers = checked(run)
    run.meter.sleep(run.clock())
    own = 1 if shape.steady else 0
    assert sum(stats.prompt_tokens for stats in run.stats) == 40 + 3 * (1 + own) + 2 * 1
    assert (answers[1].prompt_tokens, answers[1].cached_tokens) == (40, 0), "the first choice has read all of it"
    assert answers[2].cached_tokens == 39


@SHAPES
def test_cancelling_the_one_that_reads_lets_the_others_go_on(shape: Shape) -> None:
    run = rig(shape, batch_tokens=8)
    run.submit(*(job(key, (*SYSTEM, key), max_tokens=3) for key in range(4)))
    run.stepper.step()
    assert run.backlog.cancel([0]) == []
    answers = checked(run)
    assert [only(answers[key])[0] for key in (1, 2, 3)] == [said_after((*SYSTEM, key), 3) for key in (1, 2, 3)]
    assert answers[1].cached_tokens in (0, 7, 8)
    assert answers[3].cached_tokens in (39, 40)


@SHAPES
def test_one_that_is_cancelled_while_it_waits_is_given_nothing(shape: Shape) -> None:
    run = rig(shape, batch_tokens=8)
    run.submit(*(job(key, (*SYSTEM, key), max_tokens=3) for key in range(2)))
    run.stepper.step()
    run.backlog.cancel([1])
    answers = checked(run)
    assert only(answers[1])[1:] == ("cancelled", 0)
    assert run.decoder.copies == []


def test_what_an_idle_slot_has_is_copied_before_the_next_prompt_takes_that_slot() -> None:
    run = rig(Shape(keeps=True, copy_tokens=10), slots=2)
    for key in range(2):
        run.submit(job(key, (*SYSTEM, 50 + key)))
        checked(run)
    # A part of what has been asked for is not worth losing all of it: it is copied. But then slots run short.
    prompts = ((*SYSTEM[:25], 60, 61), (9,) * 30)
    run.submit(*(job(2 + place, prompt) for place, prompt in enumerate(prompts)))
    answers = checked(run)
    assert [only(answers[2 + place])[0] for place in range(2)] == [said_after(prompt, 4) for prompt in prompts]
    assert [copied for _, _, copied in run.decoder.copies] == [25]


@SHAPES
def test_after_a_failure_nothing_is_reused_that_was_there_before(shape: Shape) -> None:
    run = rig(shape)
    run.submit(job(1, SYSTEM))
    checked(run)
    run.decoder.codes = [1]
    run.submit(job(2, tuple(range(20, 50))))
    run.submit(job(3, (*SYSTEM, 9)))
    answers = checked(run)
    failed = [key for key, answer in answers.items() if answer.error]
    assert failed
    for key in {1, 2, 3} - set(failed):
        assert not answers[key].error
    run.submit(job(4, (*SYSTEM, 9, 9)))
    assert only(checked(run)[4])[0] == said_after((*SYSTEM, 9, 9), 4)


Program = list[tuple[str, int, int, int, int]]
ACTIONS = st.one_of(
    st.tuples(st.just("submit"), st.integers(0, 2), st.integers(0, 45), st.integers(1, 30), st.integers(1, 12)),
    st.tuples(st.just("many"), st.integers(0, 2), st.integers(16, 45), st.integers(1, 6), st.integers(2, 6)),
    st.tuples(st.just("choices"), st.integers(0, 2), st.integers(16, 45), st.integers(1, 3), st.integers(1, 4)),
    st.tuples(st.just("again"), st.integers(0, 30), st.integers(1, 12), st.just(0), st.just(0)),
    st.tuples(st.just("steps"), st.integers(1, 12), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("cancel"), st.integers(0, 60), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("refuse"), st.just(0), st.just(0), st.just(0), st.just(0)),
    st.tuples(st.just("damage"), st.integers(0, 4), st.just(0), st.just(0), st.just(0)),
)


class Play:
    """Plays a program of actions; what was asked is in `jobs`."""

    def __init__(self, shape: Shape) -> None:
        self.rig = rig(shape, slots=5, batch_tokens=24)
        self.jobs: dict[int, Job] = {}
        self.disturbed = False

    def ask(self, prompt: tuple[int, ...], limit: int, n: int = 1) -> None:
        one = job(len(self.jobs), prompt[:100], max_tokens=limit, n=n, ignore_eos=True)
        self.jobs[one.key] = one
        self.rig.submit(one)

    def act(self, what: str, a: int, b: int, c: int, d: int) -> None:
        def prompt(last: int) -> tuple[int, ...]:
            # Groups 0 and 1 part after 20 tokens.
            begin = tuple((a // 2 * 7 + a * (place >= 20) + place) % VOCAB_USED for place in range(b))
            return (*begin, *((last + 3 * place) % VOCAB_USED for place in range(c)))

        if what == "submit":
            self.ask(prompt(d), d)
        elif what == "many":
            for last in range(d):
                self.ask(prompt(last), c)
        elif what == "choices":
            self.ask(prompt(0), c, n=d)
        elif what == "again" and (done := self.rig.answers()):
            key = sorted(done)[a % len(done)]
            said = () if done[key].error else self.jobs[key].request.prompt
            assert isinstance(said, tuple)
            self.ask((*said, *(5,) * b)[:90], b)
        elif what == "steps":
            for _ in range(a):
                self.rig.stepper.step()
        elif what == "cancel" and self.jobs:
            self.rig.backlog.cancel([a % len(self.jobs)])
            self.disturbed = True
        elif what == "refuse":
            self.rig.decoder.codes = [1]
            self.rig.stepper._errors_in_a_row = 0  # three in a row would end the engine
            self.disturbed = True
        elif what == "damage":
            self.rig.decoder.damage = {a}
            self.disturbed = True


VOCAB_USED = EOG


@given(st.lists(ACTIONS, min_size=1, max_size=25), st.sampled_from([KEEPS, STEADY, Shape(steady=True, keeps=True)]))
def test_outputs_are_those_without_reuse_whatever_comes_together_ends_or_fails(program: Program, shape: Shape) -> None:
    play = Play(shape)
    play.rig.meter.wake(0.0)
    for action in program:
        play.act(*action)
    answers = checked(play.rig)
    play.rig.meter.sleep(play.rig.clock())
    cancelled_unstarted = set(play.jobs) - set(answers)
    for key, answer in answers.items():
        asked = play.jobs[key].request
        assert isinstance(asked.prompt, tuple)
        assert answer.cached_tokens <= max(0, answer.prompt_tokens - 1)
        for choice in answer.choices:
            assert choice.text == said_after(asked.prompt, choice.output_tokens)
    assert play.rig.backlog.running == 0
    if not play.disturbed:
        assert not cancelled_unstarted
        fed = sum(stats.prompt_tokens + stats.cached_tokens for stats in play.rig.stats)
        assert fed == sum(len(one.request.prompt) * one.request.sampling.n for one in play.jobs.values())
