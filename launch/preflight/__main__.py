"""Look at nodes, data and the network before a stage trains; one verdict a line, in a minute.

    python -m launch.preflight configs/stage1.yaml run.dir=runs/invoices          # this machine
    salloc --nodes=2 --gpus-per-node=8 .venv/bin/python -m launch.preflight configs/stage1.yaml

In a job every node is looked at. Everything has its time limit: what hangs is a verdict.
slurm/stage1.sh and stage2.sh do this by themselves; LECTERN_PREFLIGHT=off leaves it out,
LECTERN_PREFLIGHT_S changes the minute.

Exit codes: 0 ready; 2 the user must change something; 70 a node or the network cannot be used.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path

from data_tools.errors import run_command
from launch.allocation import from_environment
from launch.preflight.run import run_preflight
from train.config import load_config


def main() -> int:
    """Run the preflight and print its verdicts; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.preflight",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML of the stage")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--json", action="store_true", help="print a JSON record")
    options = parser.parse_intermixed_args()
    allocation = None
    if "SLURM_JOB_ID" in os.environ and "SLURM_STEP_ID" not in os.environ:
        allocation = from_environment()
        job = f"preflight-{allocation.job}.{allocation.restart}"
        folder = load_config(options.config, options.overrides).folder / "starts" / job
    else:
        folder = Path(tempfile.mkdtemp(prefix="lectern-preflight-"))
    try:
        report = run_preflight(options.config, options.overrides, allocation, folder)
    finally:
        if allocation is None:
            shutil.rmtree(folder)
    print(json.dumps(report.to_json(), indent=2) if options.json else report)
    return report.exit_code


if __name__ == "__main__":
    run_command(main)
