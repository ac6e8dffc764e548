"""Ranks from every launcher, and clear errors where they contradict each other."""

import pytest

import train.ranks
from data_tools.errors import ConfigError, LaunchError
from train.ranks import Ranks, export_ranks, find_ranks, stop_all
from train.rendezvous import first_host


def test_without_a_launcher_there_is_one_rank() -> None:
    found = find_ranks({})
    assert (found.rank, found.world_size) == (0, 1)
    assert found.master_port > 1023


def test_torchrun() -> None:
    env = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "1234",
    }
    assert find_ranks(env) == Ranks(3, 1, 4, 2, "n1", 1234)


def test_deepspeed_names_the_local_size_differently() -> None:
    env = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    assert find_ranks(env | {"MASTER_ADDR": "127.0.0.1"}).local_size == 2


def test_srun_with_one_task_per_rank() -> None:
    env = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "8",
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
        "MASTER_ADDR": "n1",
    }
    assert find_ranks(env) == Ranks(5, 1, 8, 4, "n1", 29500)


def test_srun_alone_meets_at_the_first_node_at_a_port_of_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    env = {
        "SLURM_PROCID": "1",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "12345",
        "SLURM_STEP_NODELIST": "localhost,n[2-3]",
    }
    found = find_ranks(env)
    assert (found.master_addr, found.master_port) == ("localhost", 22345)
    assert find_ranks(env | {"SLURM_RESTART_COUNT": "1"}).master_port == 23345
    assert find_ranks(env | {"MASTER_ADDR": "n9"}).master_addr == "n9"
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(LaunchError, match="name of node no-such-node does not resolve"):
        find_ranks(env | {"SLURM_STEP_NODELIST": "no-such-node"})


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [("n[007-010,12]", "n007"), ("gpu-a,gpu-b", "gpu-a"), ("n[1,3]-ib", "n1-ib"), ("n5", "n5")],
)
def test_the_first_node_of_slurms_lists(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_a_batch_shell_without_a_step_is_one_rank() -> None:
    assert find_ranks({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}).world_size == 1


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "2", "WORLD_SIZE": "2"}, "expected 0 to N - 1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "whole number"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR"),
    ],
)
def test_contradictions_are_named(env: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        find_ranks(env)


def test_ranks_share_the_cores_unless_threads_are_set() -> None:
    env: dict[str, str] = {}
    export_ranks(Ranks(0, 0, 2, 2), env)
    assert int(env["OMP_NUM_THREADS"]) >= 1
    env = {"OMP_NUM_THREADS": "7"}
    export_ranks(Ranks(), env)
    assert env["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("rank", "prefix"), [(0, "ConfigError"), (3, "[rank 3] ConfigError")])
def test_an_error_of_any_rank_is_told_before_it_ends(
    rank: int, prefix: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train.ranks, "SECONDS_FOR_RANK_0_TO_SPEAK", 0)
    with pytest.raises(SystemExit) as ended:
        stop_all(ConfigError("optim.lrr is not a known key"), rank)
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{prefix}: optim.lrr is not a known key\n"


def test_only_a_task_of_slurm_has_cores_of_its_own() -> None:
    shared = {"RANK": "0", "WORLD_SIZE": "1", "SLURM_CPUS_PER_TASK": "64"}
    assert find_ranks(shared).num_cores is None
    task = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "1", "SLURM_STEP_ID": "0"}
    assert find_ranks(task | {"SLURM_CPUS_PER_TASK": "4"}).num_cores == 4
