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
    stages = _plan(configs, overrides)
    exported = []
    for config, settings in stages:
        exported.append(run_stage(config, ranks, settings))
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
    return _hf(folder)


def _plan(configs: list[str], overrides: list[str]) -> list[tuple[str, list[str]]]:
    """Return (YAML, overrides) of each stage, chained by `model.path` unless the user set that."""
    is_set = any(override.partition("=")[0].strip() == "model.path" for override in overrides)
    stages: list[tuple[str, list[str]]] = []
    writers: dict[Path, str] = {}
    for config in configs:
        chained = [f"model.path={_hf(list(writers)[-1])}"] if writers and not is_set else []
        folder = load_config(config, [*overrides, *chained]).folder
        if folder in writers:
            raise ConfigError(
                f"{writers[folder]} and {config} both write to {folder}; give each its own run.dir "
                "or stage.number in its YAML"
            )
        writers[folder] = config
        stages.append((config, [*overrides, *chained]))
    return stages


def _hf(folder: Path) -> str:
    """Return where train.export writes a stage's Hugging Face folder."""
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
    run_chain(arguments.configs, arguments.ranks, arguments.set)


if __name__ == "__main__":
    run_command(main)
