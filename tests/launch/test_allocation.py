"""What a job was granted, and the srun commands that follow from it."""

from pathlib import Path

import pytest

from data_tools.errors import LaunchError
from launch.allocation import (
    Allocation,
    count_cpus,
    count_gpus,
    count_tasks,
    find_container,
    from_environment,
)
from tests.launch.stubs import stub_programs

JOB = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NODELIST": "node[7-8]",
    "SLURM_JOB_CPUS_PER_NODE": "8(x2)",
}
SCONTROL = """
case "$*" in
  "show hostnames node[7-8]") printf '%s\\n' node7 node8 ;;
  "-o show node node7") echo "NodeName=node7 NodeAddr=10.1.2.3 NodeHostName=node7" ;;
  *) exit 1 ;;
esac
"""


@pytest.fixture
def _scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub_programs(tmp_path, monkeypatch, scontrol=SCONTROL)


@pytest.mark.parametrize(
    ("granted", "num_ranks"),
    [
        ({"SLURM_GPUS_ON_NODE": "8"}, 16),
        ({"SLURM_GPUS_ON_NODE": "4", "SLURM_NTASKS": "2"}, 8),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_GPUS_PER_NODE": "h100:4"}, 8),
        ({"SLURM_NTASKS": "6"}, 6),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_NTASKS": "4"}, 4),
        ({}, 2),
    ],
)
@pytest.mark.usefixtures("_scontrol")
def test_one_rank_a_gpu_else_a_task_else_a_node(granted: dict, num_ranks: int) -> None:
    assert from_environment(JOB | granted).num_ranks == num_ranks


@pytest.mark.parametrize(
    ("granted", "cpus"),
    [
        ({"SLURM_JOB_CPUS_PER_NODE": "64(x2)"}, 8),
        ({"SLURM_JOB_CPUS_PER_NODE": "96(x3),48"}, 6),
        ({"SLURM_JOB_CPUS_PER_NODE": "4(x2)"}, 1),
        ({"SLURM_JOB_CPUS_PER_NODE": "64(x2)", "SLURM_CPUS_PER_TASK": "3"}, 3),
    ],
)
def test_cpus_of_a_rank_are_its_share_of_the_smallest_node(granted: dict, cpus: int) -> None:
    assert count_cpus(granted, ranks_per_node=8) == cpus


def test_gpus_and_tasks_that_cannot_be_laid_out_are_refused() -> None:
    assert count_gpus({}) == 0
    with pytest.raises(LaunchError, match="3 tasks on 2 nodes: ask for --ntasks-per-node"):
        count_tasks({"SLURM_NTASKS": "3"}, 2)
    with pytest.raises(LaunchError, match="ask for --gpus-per-node instead of --gpus-per-task"):
        from_environment(JOB | {"SLURM_GPUS_PER_TASK": "1"})
    with pytest.raises(LaunchError, match="submit it with sbatch"):
        from_environment({})


@pytest.mark.usefixtures("_scontrol")
def test_the_head_is_its_node_address_where_names_do_not_resolve() -> None:
    allocation = from_environment(JOB)
    assert (allocation.master_addr, allocation.master_port) == ("10.1.2.3", 22345)
    assert "2 ranks on 2 nodes (node7,node8), 0 GPUs a node, 8 CPUs a rank" in str(allocation)


def test_the_head_is_that_of_the_site_where_slurm_knows_no_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_programs(tmp_path, monkeypatch, scontrol="exit 1")
    nowhere = granted(nodes=("no-such-node.invalid",))
    with pytest.raises(LaunchError, match="export MASTER_ADDR in slurm/site.sh"):
        _ = nowhere.master_addr
    monkeypatch.setenv("MASTER_ADDR", "10.9.8.7")
    assert nowhere.master_addr == "10.9.8.7"


def granted(**changes: object) -> Allocation:
    values: dict = {
        "job": "1",
        "restart": 0,
        "nodes": ("a", "b", "c"),
        "gpus_per_node": 4,
        "ranks_per_node": 4,
        "cpus_per_rank": 2,
    }
    return Allocation(**values | changes)


def test_a_step_of_ranks_ends_as_a_whole_and_sees_all_gpus() -> None:
    command = granted().step(["python", "x.py"])
    for option in (
        "--nodes=3",
        "--nodelist=a,b,c",
        "--ntasks=12",
        "--ntasks-per-node=4",
        "--cpus-per-task=2",
        "--gpus-per-node=4",
        "--kill-on-bad-exit=1",
        "--wait=60",
        "--export=ALL",
    ):
        assert option in command
    assert command[-2:] == ["python", "x.py"]
    assert "--gpus-per-node=0" not in granted(gpus_per_node=0).step(["x"])


def test_a_step_of_nodes_has_all_cores_and_outlives_one_of_its_tasks() -> None:
    command = granted().on(["c", "a"]).step(["x"], per_node=1)
    assert {"--nodelist=a,c", "--ntasks=2", "--cpus-per-task=8"} <= set(command)
    assert "--kill-on-bad-exit=0" in command


def test_containers_of_the_site() -> None:
    pyxis = find_container(
        {"LECTERN_CONTAINER": "x.sqsh", "LECTERN_CONTAINER_MOUNTS": "/data:/data"}
    )
    command = granted(container=pyxis).step(["python3", "x.py"])
    assert "--container-image=x.sqsh" in command
    assert any(o.startswith("--container-mounts=") and o.endswith(",/data:/data") for o in command)
    assert pyxis.python == "python3"
    apptainer = find_container(
        {"LECTERN_APPTAINER": "x.sif", "LECTERN_CONTAINER_PYTHON": "/v/python"}
    )
    command = granted(container=apptainer).step(["/v/python", "x.py"])
    assert command[-3:] == ["x.sif", "/v/python", "x.py"]
    assert "--nv" in command
    with pytest.raises(LaunchError, match="keep one"):
        find_container({"LECTERN_CONTAINER": "a", "LECTERN_APPTAINER": "b"})
