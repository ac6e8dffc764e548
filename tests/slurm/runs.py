"""Tiny runs of a stage as jobs, and what they leave behind."""

from collections.abc import Sequence
from pathlib import Path

from tests.builders import run_record, write_run, write_shards
from tests.launches import BIN
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import Job
from tests.train.tiny import tiny_folder

TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
FOREVER = {"max_steps": 100_000, "epochs": 100_000}
ENVIRONMENT = {
    "LECTERN_PYTHON": str(BIN / "python"),
    "LECTERN_PREFLIGHT": "off",
    "OMP_NUM_THREADS": "1",
    "DS_ACCELERATOR": "cpu",
}


def tiny_run(folder: Path, **changes: dict) -> Path:
    """Write a model, shards and the configuration of a stage 1; return the configuration."""
    model = tiny_folder(folder / "model")
    shards = write_shards(folder / "shards", [12, 12])
    record = run_record(folder / "run", model, shards, stage={"number": 1, "max_steps": 3})
    for section, change in changes.items():
        record[section] = record.get(section, {}) | change
    return write_run(folder / "stage1.yaml", record)


def submit_stage(
    cluster: Cluster,
    config: Path,
    *overrides: str,
    options: Sequence[str] = TWO_NODES,
    **environment: str,
) -> Job:
    """Submit slurm/stage1.sh without a preflight, unless LECTERN_PREFLIGHT says otherwise."""
    env = ENVIRONMENT | environment
    return cluster.submit(options, "slurm/stage1.sh", str(config), *overrides, env=env)
