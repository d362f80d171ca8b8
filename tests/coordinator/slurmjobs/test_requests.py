"""Options of sbatch, what they ask for, and whether a Slurm has it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import pytest

from coordinator.slurmjobs.jobrequest import JobRequest, read_request
from coordinator.slurmjobs.partitions import check_fits, read_partitions
from scheduling.errors import ConfigError, InfrastructureError
from tests.coordinator.slurmjobs.fakes import FakeSlurm


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("-N2 -n 3", {"nodes": 2, "tasks": 3, "ranks": 3}),
        ("--nodes=2-4 --ntasks-per-node 4", {"nodes": 2, "tasks_per_node": 4, "ranks": 8}),
        ("--ntasks-per-node=4", {"ranks": 4}),
        ("-p gpu,long -t 1-12", {"partition": "gpu,long", "time_s": 36 * 3600.0}),
        ("-t90 -pcpu", {"time_s": 5400.0, "partition": "cpu"}),
        ("--gpus-per-node=a100:4", {"gpus_per_node": 4}),
        ("--gres=gpu:2,shard:9", {"gpus_per_node": 2}),
        ("--gres gpu", {"gpus_per_node": 1}),
        ("--gres=shard:9", {"gpus_per_node": None}),
        ("--gpus-per-task=1 --ntasks-per-node=3", {"gpus_per_node": 3}),
        ("-G a100:2,v100:3", {"gpus": 5}),
        ("--mem 20G --account=x -o out-%j -J name", {"log": "out-%j", "ranks": 1}),
        ("--unheard-of --exclusive=user", {"ranks": 1}),
        ("-N3", {"ranks": 3}),
        ("-G 8 --gpus-per-task=1", {"ranks": None}),
        ("-N2 --gpus-per-node 4 --ntasks-per-gpu 1", {"ranks": None}),
        ("--ntasks-per-socket 2 --hint nomultithread -L matlab:1 -S 1 -b now+1hour -n 4", {"ranks": 4}),
    ],
)
def test_options_are_read_and_kept(words: str, expected: dict[str, object]) -> None:
    found = read_request(words.split())
    assert {name: getattr(found, name) for name in expected} == expected
    assert found.words == tuple(words.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run.sh", "'run.sh' is no option of sbatch"),
        ("-N 2 batch", "'batch' is no option of sbatch"),
        ("--unheard-of 3", "If it belongs to --unheard-of, write --unheard-of=3"),
        ("-n none", "--ntasks=none: a number above 0 is wanted"),
        ("--nodes=0", "a number above 0"),
        ("-t soon", "--time=soon: give minutes"),
        ("--array=0-7", "--array is not for llmpi submit: an array works on slices"),
        ("-d afterok:7", "--dependency is not for llmpi submit"),
        ("--wrap=true", "writes the script itself"),
        ("-N2 -W", "-W is not for llmpi submit: write --wait, which waits for the run"),
    ],
)
def test_what_cannot_be_meant_is_refused(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        read_request(words.split())


def test_partitions_are_put_together_from_their_nodes() -> None:
    main, *others = read_partitions(FakeSlurm())
    assert (main.name, main.default, main.nodes, main.gpus_per_node, main.time_s) == ("main", True, 8, 4, 3600.0)
    assert [other.name for other in others] == ["cpu", "short", "off"]
    assert (others[0].time_s, others[0].cpus_per_node, others[0].gpus_per_node) == (math.inf, 64, 0)
    assert others[2].up is False


def test_where_no_slurm_answers_it_is_said_where_one_would() -> None:
    def fails(command: Sequence[str]) -> str:
        raise InfrastructureError(f"{command[0]}: fatal: Could not establish a configuration source")

    with pytest.raises(InfrastructureError, match=r"no Slurm answers here.*configuration source.*login node"):
        read_partitions(fails)


def fits(words: str) -> tuple[str, list[str]]:
    partition, advice = check_fits(read_request(words.split()), read_partitions(FakeSlurm()))
    return partition.name, advice


@pytest.mark.parametrize(
    ("words", "partition"),
    [
        ("--gpus-per-node=4 --ntasks-per-node=4 -N8 -t 60", "main"),
        ("-p cpu -N 10 -t 30-0", "cpu"),
        ("-p cpu,main -n3", "cpu"),
        ("-G 8 -n 9 -N2 --exclusive", "main"),
        ("-G 4 -n 5", "main"),
        ("-p cpu -N2 -n 9", "cpu"),
    ],
)
def test_what_fits_is_not_talked_about(words: str, partition: str) -> None:
    assert fits(words) == (partition, [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-p nowhere", "there is no partition nowhere: this Slurm has main, cpu, short, off"),
        ("-p off", "takes no jobs now"),
        ("-N 9", "9 nodes are wanted, but partition main has 8"),
        ("--gpus-per-node=8", "8 GPUs a node are wanted, but nodes of partition main have 4"),
        ("-p cpu -G 1", "nodes of partition cpu have none"),
        ("-N 2 -G 9", "5 GPUs a node are wanted"),
        ("-t 61", "--time is 1h01m, but partition main allows 1h00m: leave it out"),
    ],
)
def test_what_would_never_start_is_refused(words: str, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        fits(words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("-n 3", "no GPU is asked for, and nodes of main have 4"),
        ("--gpus-per-node=4 --ntasks-per-node=2 -N2", "8 GPUs are asked for and 4 ranks: 4 GPUs would idle"),
        ("--gpus-per-node=4 -N2", "8 GPUs are asked for and 2 ranks: 6 GPUs would idle"),
        ("--gpus-per-node=1 -n 8", "8 ranks and 1 GPU: without --ranks-per-gpu the job refuses that"),
        ("-N2 -n 9 --gpus-per-node=4", "fills the first node with as many of 9 ranks as it has processors for"),
    ],
)
def test_what_is_seldom_meant_is_said(words: str, said: str) -> None:
    (advice,) = fits(words)[1]
    assert said in advice


def test_a_slurm_without_a_default_wants_to_be_told() -> None:
    with pytest.raises(ConfigError, match="no default partition: give -p cpu"):
        check_fits(read_request([]), read_partitions(FakeSlurm("cpu|up|1:00|n/a|1|8|(null)|idle\n")))
    with pytest.raises(ConfigError, match="shows no partition"):
        check_fits(read_request([]), read_partitions(FakeSlurm("")))


def test_a_request_is_a_plain_value() -> None:
    assert read_request(["-n2"]) == JobRequest(("-n2",), None, None, 2, None, None, None, None, None)
