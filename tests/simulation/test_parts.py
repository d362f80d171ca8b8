"""The parts of the simulated world: network, disk, engines, rank 0's time."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random

import pytest

from scheduling.requests import Request
from storage.record import GroupCommit, open_record
from storage.recovery import recover
from tests.simulation.agenda import Agenda, Trace, ViolationError
from tests.simulation.disk import Outside, SimulatedDisk, Storage
from tests.simulation.engines import Deaths, SimulatedEngine, Temper
from tests.simulation.network import Network
from tests.simulation.rank0 import TURNS_MAX, Incident, Rank0, Rank0DiedError
from tests.simulation.weather import Weather
from tests.storage.samples import ok_line
from workers.protocol import EngineLoaded, Frame, Job, Returned, Stats

STORMY = Weather(calm_at_s=1e9, chances={"message delayed": 0.5, "message duplicated": 0.5}, latency_s=0.01)


def until(agenda: Agenda, end_s: float) -> None:
    while agenda.next_s() <= end_s:
        agenda.step()
    agenda.now_s = end_s


# ---------------------------------------------------------------- network


def network(seed: int) -> tuple[Agenda, Network, list[int]]:
    agenda, arrived = Agenda(), list[int]()
    return agenda, Network(agenda, Trace(), STORMY, Random(seed), arrived.append), arrived


@pytest.mark.parametrize("seed", range(5))
def test_envelopes_of_one_rank_come_in_order_and_none_is_missing_until_it_dies(seed: int) -> None:
    agenda, net, _ = network(seed)
    near, far = net.endpoint(0), net.endpoint(1)
    for number in range(40):
        agenda.after(0.01 * number, lambda number=number: far.post(0, b"%d" % number))  # type: ignore[misc]
    until(agenda, 10.0)
    first_times = list(dict.fromkeys(int(payload) for _, payload in near.receive()))
    assert first_times == list(range(40))
    for number in range(40):
        far.post(0, b"%d" % number)
    net.die(1)
    until(agenda, 20.0)
    left = list(dict.fromkeys(int(payload) for _, payload in near.receive()))
    assert left == list(range(len(left)))
    assert len(left) < 40


def test_a_cut_link_holds_everything_back_in_order() -> None:
    agenda, net, arrived = network(1)
    near, far = net.endpoint(0), net.endpoint(1)
    net.cut(1)
    for number in range(5):
        far.post(0, b"%d" % number)
    until(agenda, 5.0)
    assert not arrived
    net.heal(1)
    until(agenda, 10.0)
    assert list(dict.fromkeys(int(payload) for _, payload in near.receive())) == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- disk


def test_a_loss_of_power_leaves_what_was_synced_and_an_arbitrary_part_of_the_rest() -> None:
    path = Path("/disk/run/results.jsonl")
    lengths = set()
    for seed in range(40):
        storage = Storage(Path("/disk"))
        disk = SimulatedDisk(storage, Outside())
        disk.make_dirs(path.parent)
        disk.sync_dir(path.parent.parent)
        core = GroupCommit(open_record(disk, path), path)
        core.add([ok_line(0)], 0.0)
        core.commit()
        file = disk.open_append(path)
        file.write(ok_line(1))
        storage.power_lost(Random(seed))
        left = storage.content(path)
        assert left.startswith(ok_line(0)), "what was synced is there"
        lengths.add(len(left))
        assert recover(disk, path).ok >= 1
    assert len(lengths) > 5


def test_operations_fail_or_end_the_process_where_they_are_told_to() -> None:
    agenda = Agenda()
    rank0 = Rank0(agenda, Trace(), 0.0)
    storage = Storage(Path("/disk"))
    disk = SimulatedDisk(storage, rank0)
    file = disk.open_append(Path("/disk/results.jsonl"))
    rank0.incidents.append(Incident(2, "results.jsonl", half=True, number=errno.ENOSPC))
    file.write(b"whole")
    with pytest.raises(OSError, match="No space left"):
        file.write(b"1234")
    file.write(b"right again")
    assert storage.content(Path("/disk/results.jsonl")) == b"whole12right again"
    rank0.incidents.append(Incident(1, None, half=False, do=rank0.die))
    with pytest.raises(Rank0DiedError):
        file.sync()
    with pytest.raises(Rank0DiedError):
        disk.remove(Path("/disk/results.jsonl"))


def test_a_look_takes_time_only_while_the_disk_is_slow() -> None:
    agenda = Agenda()
    rank0 = Rank0(agenda, Trace(), 0.0)
    disk = SimulatedDisk(Storage(Path("/disk")), rank0)
    disk.exists(Path("/disk/stop"))
    assert agenda.now_s == 0.0
    rank0.latency_s = 2.0
    disk.exists(Path("/disk/stop"))
    assert agenda.now_s == rank0.held_up_s == 2.0


# ---------------------------------------------------------------- rank 0's time


def test_rank_0_sleeps_at_least_as_long_as_it_asks_and_not_much_longer_than_what_concerns_it() -> None:
    agenda = Agenda()
    rank0 = Rank0(agenda, Trace(), 0.0)
    agenda.at(0.05, rank0.stir)
    rank0.sleep([], 0.001)
    assert agenda.now_s == pytest.approx(0.05)
    agenda.at(0.06, rank0.stir)
    rank0.sleep([], 0.1)
    assert agenda.now_s == pytest.approx(0.15)


def test_a_loop_that_never_sleeps_is_found() -> None:
    rank0 = Rank0(Agenda(), Trace(), 0.0)
    for _ in range(TURNS_MAX):
        rank0.clock()
    with pytest.raises(ViolationError, match="spins"):
        rank0.clock()


# ---------------------------------------------------------------- engines


def job(key: int) -> Job:
    return Job(key, key, False, Request(custom_id=f"r{key}", kind="completion", prompt=f"prompt {key}"))


def test_an_engine_says_what_a_real_one_says() -> None:
    agenda = Agenda()
    temper = Temper(slots=1, load_s=1.0, token_s=0.1, max_tokens=8)
    deaths = Deaths()
    engine = SimulatedEngine(lambda: agenda.now_s, lambda at_s: None, Random(1), temper, deaths)
    assert engine.poll() == []
    agenda.now_s = 1.0
    assert [type(said) for said in engine.poll()] == [EngineLoaded]
    engine.submit([job(0), job(1), job(2)])
    assert engine.poll() == [Frame(started=[0])]
    engine.recall(7, [0, 2])
    assert engine.poll() == [Returned(7, [2])]
    with pytest.raises(ViolationError, match="has it"):
        engine.submit([job(1)])
    agenda.now_s = 3.0
    frames = [said for said in engine.poll() if not isinstance(said, Stats)]
    assert [answer.key for said in frames if isinstance(said, Frame) for answer in said.finished] == [0, 1]
    engine.submit([job(3)])
    engine.kill("it was killed by signal 9")
    engine.poll()
    assert not engine.alive
    assert deaths.counts == {3: 1}
