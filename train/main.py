"""Train one stage.

    DS_ACCELERATOR=cpu deepspeed --num_gpus 2 train/main.py \
        --config configs/quickstart/stage1.yaml                                     # a laptop's CPU
    deepspeed train/main.py --config configs/stage1.yaml run.dir=runs/invoices      # one node
    sbatch slurm/stage1.sh configs/stage1.yaml run.dir=runs/invoices                # a cluster
    srun --ntasks-per-node=8 .venv/bin/python train/main.py --config ...            # or by hand
    python train/main.py --config configs/stage1.yaml --dry-run                     # plan only

Exit codes: 0 done; 2 something to change (config, path, world size, a collapsing stage); 65 the
data is bad beyond `data.max_hole_share`; 70 a defect; 75 interrupted, saved: start again.
"""

import argparse
import os
import sys
import traceback
from pathlib import Path

# deepspeed and torchrun put train/ first on the path; the packages lie in its parent.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from data_tools.errors import EXIT_DEFECT, LecternError
from train.config import load_config
from train.ranks import export_ranks, find_ranks, stop_all
from train.shards import find_shards
from train.signals import StopSignal

DEFAULT_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "stage1.yaml"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=DEFAULT_CONFIG, help="YAML of the stage")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # deepspeed's
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    return parser.parse_intermixed_args(arguments)


def main() -> int:
    """Validate before any heavy import, then train."""
    arguments = parse_arguments()
    rank = int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) or 0)
    try:
        ranks = find_ranks()
        config = load_config(arguments.config, arguments.overrides)
        export_ranks(ranks, os.environ)
        shards = find_shards(config, ranks)
        if arguments.dry_run:
            from train.dry_run import dry_run

            dry_run(config, shards)
            return 0
        stop = StopSignal()
        from train.loop import train

        return train(config, shards, ranks, stop)
    except LecternError as error:
        stop_all(error, rank)
    except Exception:
        traceback.print_exc()
    return EXIT_DEFECT


if __name__ == "__main__":
    sys.exit(main())
