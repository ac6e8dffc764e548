"""Train stages one after the other on this machine, each exported before the next starts.

    python -m launch.chain configs/quickstart/stage1.yaml configs/quickstart/stage2.yaml --ranks 2

Each stage goes on from its newest checkpoint; what is done is skipped. On a cluster the same chain
runs as jobs (slurm/).
"""

import argparse

from data_tools.errors import run_command
from launch.process import python, run, train_command
from train.config import load_config


def run_stage(config: str, ranks: int | None, overrides: list[str]) -> str:
    """Train and export one stage; return its Hugging Face folder."""
    run(train_command(config, ranks, overrides))
    folder = load_config(config, overrides).folder
    run(python("-m", "train.export", str(folder)))
    return str(folder / "hf")


def main() -> None:
    """Run the chain."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="YAML of each stage, in order")
    parser.add_argument("--ranks", type=int, help="processes a stage; default: one a GPU")
    parser.add_argument("--set", action="append", default=[], metavar="key.path=value")
    arguments = parser.parse_args()
    for config in arguments.configs:
        print(run_stage(config, arguments.ranks, arguments.set))


if __name__ == "__main__":
    run_command(main)
