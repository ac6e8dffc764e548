"""What a job script runs: a command from a configuration and overrides, or from its own arguments.

    python -m launch.job_command shard configs/pipeline.yaml shard.tasks=8
    python -m launch.job_command shard data/invoices data/shards --unit line
    python -m launch.job_command convert configs/stage1.yaml run.dir=runs/invoices --dtype fp32
    python -m launch.job_command evaluate configs/stage2.yaml run.dir=runs/invoices --num 500
    python -m launch.job_command predict runs/invoices/stage2/hf 's3://bucket/*.png' --out read

Called by slurm/shard.sh, convert.sh, evaluate.sh and predict.sh. A stage's YAML with its overrides
stands for the stage's folder (convert) or for its export (evaluate, predict); what follows are
options of the command. Prints the command and becomes it. In an array job each task does its part.
"""

import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence

from data_tools.errors import ConfigError, LaunchError, run_command
from launch.pipeline.config import load_pipeline
from launch.pipeline.plan import shard_arguments
from train.config import load_config

MODULES = {
    "shard": "data_tools.build",
    "convert": "train.export",
    "evaluate": "inference.evaluate",
    "predict": "inference.predict",
}
IN_PARTS = ("shard", "predict")
_OVERRIDE = re.compile(r"[a-z_]\w*(\.\w+)*=.*", re.DOTALL)


def resolve(name: str, words: Sequence[str], environment: Mapping[str, str]) -> list[str]:
    """Return the module and arguments that a step's words stand for.

    Args:
        name: shard, convert, evaluate or predict.
        words: as given to the job script.
        environment: of the job.

    Raises:
        ConfigError: if there are no words, or the configuration is wrong.
        LaunchError: if the array of the job does not number its tasks without gaps.
    """
    if not words:
        raise ConfigError(f"{name}: expected a configuration, or arguments of {MODULES[name]}")
    arguments = list(words)
    if words[0].endswith((".yaml", ".yml")):
        arguments = _from_config(name, words[0], list(words[1:]))
    if name in IN_PARTS and not any(word.split("=")[0] == "--part" for word in arguments):
        arguments += part_of_array(environment)
    return [MODULES[name], *arguments]


def _from_config(name: str, config: str, words: list[str]) -> list[str]:
    """Return the arguments that a YAML, its overrides and further words stand for."""
    overrides = []
    while words and _OVERRIDE.fullmatch(words[0]):
        overrides.append(words.pop(0))
    if name == "shard":
        section = load_pipeline(config, overrides).shard
        if section is None:
            raise ConfigError(f"{config}: there is no section `shard`")
        return [*shard_arguments(section), *words]
    stage = load_config(config, overrides)
    if name == "convert":
        return [str(stage.folder), *words]
    arguments = [str(stage.folder / "hf"), *words]
    if name == "evaluate":
        if not words or words[0].startswith("-"):
            arguments[1:1] = stage.data.validation
        if "--out" not in words:
            arguments += ["--out", str(stage.folder / "report")]
    return arguments


def part_of_array(environment: Mapping[str, str]) -> list[str]:
    """Return `--part K/N` of an array task; nothing outside of an array.

    Raises:
        LaunchError: if the tasks are not numbered evenly, so that K is not below N.
    """
    if "SLURM_ARRAY_TASK_ID" not in environment:
        return []
    number, first, step, count = (
        int(environment.get(f"SLURM_ARRAY_TASK_{key}", default))
        for key, default in (("ID", "0"), ("MIN", "0"), ("STEP", "1"), ("COUNT", "1"))
    )
    part, rest = divmod(number - first, step)
    if rest or part >= count:
        raise LaunchError(
            f"array task {number} of {count} from {first} on: an array with gaps cannot be shared "
            "out; submit the whole array again, finished parts end at once, or give --part K/N"
        )
    return ["--part", f"{part}/{count}"]


def main() -> None:
    """Print the command of a step and become it."""
    if len(sys.argv) < 2 or sys.argv[1] not in MODULES:
        raise ConfigError(f"python -m launch.job_command {'|'.join(MODULES)} WORDS...")
    name, *words = sys.argv[1:]
    command = [sys.executable, "-m", *resolve(name, words, os.environ)]
    print(f"+ {shlex.join(command)}", flush=True)
    os.execv(command[0], command)


if __name__ == "__main__":
    run_command(main)
