"""Train stages one after the other on this machine, each exported before the next starts.

    python -m launch.chain configs/quickstart/stage1.yaml configs/quickstart/stage2.yaml --ranks 2
    python -m launch.chain configs/stage1.yaml configs/stage2.yaml --set run.dir=runs/invoices

Every stage after the first starts from the export of the one before, whatever `model.path` its YAML
names; `--set model.path=...` starts all of them from that folder. Each stage goes on from its
newest checkpoint; what is done is skipped. On a cluster the same chain runs as jobs (slurm/).
"""

import argparse
from pathlib import Path

from data_tools.errors import ConfigError, run_command
from launch.process import python, run, train_command
from train.config import load_config


def run_chain(configs: list[str], ranks: int | None, overrides: list[str]) -> list[str]:
    """Train and export stages in turn; return their Hugging Face folders.

    Args:
        configs: YAML of each stage, in order.
        ranks: processes a stage; None: one a GPU.
        overrides: `key.path=value` for every stage.

    Raises:
        ConfigError: before anything starts, if a configuration is wrong or two stages would write
            to one folder.
        LaunchError: if a stage fails.
    """
    stages: dict[Path, str] = {}
    for config in configs:
        folder = load_config(config, overrides).folder
        if folder in stages:
            raise ConfigError(
                f"{stages[folder]} and {config} both write to {folder}; give each its own run.dir "
                "or stage.number in its YAML"
            )
        stages[folder] = config
    exported: list[str] = []
    for config in configs:
        exported.append(run_stage(config, ranks, [*overrides, *_start_from(exported, overrides)]))
        print(exported[-1], flush=True)
    return exported


def run_stage(config: str, ranks: int | None, overrides: list[str]) -> str:
    """Train and export one stage; return its Hugging Face folder.

    Raises:
        LaunchError: if training or export fails.
    """
    folder = load_config(config, overrides).folder
    advice = (
        f"Read its message above; {folder}/log.jsonl holds the values up to there, "
        f"{folder}/faults.jsonl the samples that were left out"
    )
    run(train_command(config, ranks, overrides), advice=advice)
    run(python("-m", "train.export", str(folder)))
    return str(folder / "hf")


def _start_from(exported: list[str], overrides: list[str]) -> list[str]:
    """Return the override that lets a stage start from the last export, unless the user did so."""
    is_set = any(override.partition("=")[0].strip() == "model.path" for override in overrides)
    return [] if is_set or not exported else [f"model.path={exported[-1]}"]


def main() -> None:
    """Run the chain."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="YAML of each stage, in order")
    parser.add_argument("--ranks", type=int, help="processes a stage; default: one a GPU")
    parser.add_argument("--set", action="append", default=[], metavar="key.path=value")
    arguments = parser.parse_args()
    run_chain(arguments.configs, arguments.ranks, arguments.set)


if __name__ == "__main__":
    run_command(main)
