"""Run the preflight: children on every node, each with its time limit, and their answers.

In a job every node is looked at (`launch.preflight.node_check`), then the ranks meet on those that
are well (`train.probe`) while each node reads some samples (`data_tools.check`).
"""

import json
import os
import re
import secrets
import socket
import struct
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.errors import ConfigError
from launch.allocation import Allocation
from launch.preflight.findings import (
    NodeAnswer,
    Report,
    Verdict,
    Wanted,
    compare_nodes,
    conclude,
    judge_data,
    judge_node,
    judge_world,
)
from launch.preflight.on_nodes import Answer, Answers, Step, labelled
from launch.preflight.probe_findings import judge_probe
from train.config import Config, load_config
from train.ranks import free_port
from train.status import write_json

__all__ = ["Report", "Verdict", "run_preflight"]

LIMIT_S = 60.0
NODES_SHARE = 0.35  # of the time, for the look at the nodes
MARGIN_S = 4.0  # for the probe to say itself who is missing, and for srun to end
NUM_SAMPLES = 64
CHECKPOINT_BYTES = 12  # a trained parameter: float32 weight and AdamW's two moments
VISION_PREFIX = "visual."
_ERROR = re.compile(r"\w*Error: |srun: error: ")


@dataclass(frozen=True)
class _Place:
    """Where ranks would run: the nodes of a job, or this machine.

    Attributes:
        allocation: of the job; None on this machine.
        nodes: names.
        python: interpreter.
    """

    allocation: Allocation | None
    nodes: tuple[str, ...]
    python: str

    def node_step(self, arguments: Sequence[str], limit_s: float) -> Step:
        """Start a module once a node."""
        command = [self.python, "-m", *arguments]
        if self.allocation is None:
            return Step([command], limit_s, [dict(os.environ)], is_labelled=False)
        command = labelled(self.allocation.step(command, per_node=1))
        return Step([command], limit_s, [dict(os.environ)], is_labelled=True)

    def rank_step(self, arguments: Sequence[str], num_ranks: int, limit_s: float) -> Step:
        """Start a module once a rank."""
        command = [self.python, "-m", *arguments]
        if self.allocation is not None:
            meeting = {
                "MASTER_ADDR": self.allocation.master_addr,
                "MASTER_PORT": str(self.allocation.master_port),
            }
            command = labelled(self.allocation.step(command))
            return Step([command], limit_s, [dict(os.environ) | meeting], is_labelled=True)
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        sizes = {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
        environments = [
            dict(os.environ) | meeting | sizes | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            for rank in range(num_ranks)
        ]
        return Step([command] * num_ranks, limit_s, environments, is_labelled=False)


def run_preflight(
    config_path: str,
    overrides: Sequence[str],
    allocation: Allocation | None,
    folder: Path,
    limit_s: float | None = None,
) -> Report:
    """Look at everything a stage needs; the report is also written to preflight.json.

    Args:
        config_path: YAML of the stage.
        overrides: `key.path=value`.
        allocation: of the job; None looks at this machine alone.
        folder: for preflight.json and the ranks' answers, shared by all nodes.
        limit_s: seconds for everything; None takes LECTERN_PREFLIGHT_S, or a minute.

    Raises:
        ConfigError: if the configuration is wrong.
    """
    config = load_config(config_path, list(overrides))
    deadline = time.monotonic() + (limit_s or _limit(os.environ.get("LECTERN_PREFLIGHT_S")))
    folder.mkdir(parents=True, exist_ok=True)
    if allocation is None:
        place = _Place(None, (socket.gethostname().split(".")[0],), sys.executable)
    else:
        place = _Place(allocation, allocation.nodes, allocation.container.python)
    verdicts, answers = _look_at_nodes(config, place, deadline)
    so_far = conclude(verdicts)
    healthy = tuple(node for node in place.nodes if node not in so_far.bad_nodes)
    if healthy:
        if allocation is not None:
            allocation = allocation.on(healthy)
        place = _Place(allocation, healthy, place.python)
        verdicts += _look_at_ranks(config, place, answers, folder, deadline)
    report = conclude(verdicts)
    write_json(folder / "preflight.json", report.to_json())
    return report


def _limit(text: str | None) -> float:
    try:
        limit_s = float(text) if text else LIMIT_S
    except ValueError:
        limit_s = 0.0
    if limit_s <= 0:
        raise ConfigError(f"LECTERN_PREFLIGHT_S={text}: expected seconds above 0")
    return limit_s


def _look_at_nodes(
    config: Config, place: _Place, deadline: float
) -> tuple[list[Verdict], dict[str, NodeAnswer]]:
    """Return the verdicts on all nodes, and the answers of those that gave one."""
    wanted = _wanted(config, place.allocation)
    limit_s = NODES_SHARE * (deadline - time.monotonic())
    token = config.folder / f".preflight-{secrets.token_hex(8)}"
    arguments = ["launch.preflight.node_check", "--folder", str(config.folder.absolute())]
    arguments += ["--model", os.path.abspath(config.model.path), "--token", token.name]
    with suppress(OSError):  # every node says of the folder what is the matter
        config.folder.mkdir(parents=True, exist_ok=True)
        token.touch()
    try:
        said = place.node_step(arguments, limit_s).wait()
    finally:
        with suppress(OSError):
            token.unlink()
    verdicts, answers = [], {}
    for number, node in enumerate(place.nodes):
        task = said.task(number)
        about = _record(task.out)
        if about is None:
            why = _complaint(task, said) or f"no answer within {limit_s:.0f} s"
            verdicts.append(Verdict("answer", "FAIL", node, f"{why}: take the node out"))
            continue
        answers[node] = NodeAnswer(about, said.begin_s, task.time_s)
        verdicts += judge_node(node, answers[node], wanted)
    return verdicts + compare_nodes(answers), answers


def _wanted(config: Config, allocation: Allocation | None) -> Wanted:
    trained = count_trained(Path(config.model.path), config.stage.number)
    return Wanted(
        gpus=allocation.gpus_per_node if allocation is not None and not _is_cpu() else 0,
        ranks_per_node=allocation.ranks_per_node if allocation is not None else 1,
        checkpoint_bytes=0 if config.model.adapter else CHECKPOINT_BYTES * trained,
        num_checkpoints=config.checkpoint.keep_last + 1,  # the next one is written before
        has_weights=config.model.init == "pretrained",
    )


def _is_cpu() -> bool:
    return os.environ.get("DS_ACCELERATOR") == "cpu"


def count_trained(model: Path, stage: int) -> int:
    """Return the parameters that a stage trains, from the headers of a model's weight files.

    A file of safetensors begins with the length of its header, 8 bytes, and the header, JSON with
    the shape of every tensor (format of version 0.5). What cannot be read counts as 0.
    """
    total = 0
    for path in model.glob("*.safetensors"):
        try:
            with open(path, "rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
        except (OSError, ValueError, struct.error):
            continue  # the nodes say what is the matter with the folder
        for name, tensor in header.items():
            is_trained = stage == 2 or VISION_PREFIX in name
            if name != "__metadata__" and is_trained:
                count = 1
                for size in tensor["shape"]:
                    count *= size
                total += count
    return total


def _look_at_ranks(
    config: Config,
    place: _Place,
    answers: dict[str, NodeAnswer],
    folder: Path,
    deadline: float,
) -> list[Verdict]:
    """Let the ranks meet on healthy nodes, and every node read some data meanwhile."""
    allocation = place.allocation
    if allocation is not None:
        ranks_per_node, needs_gpu = allocation.ranks_per_node, allocation.gpus_per_node > 0
    else:
        num_gpus = len(answers[place.nodes[0]].about["gpus"]["list"])
        ranks_per_node, needs_gpu = max(1, 0 if _is_cpu() else num_gpus), num_gpus > 0
    num_ranks = ranks_per_node * len(place.nodes)
    left_s = max(1.0, deadline - time.monotonic())
    data = place.node_step(_data_command(config), left_s)
    files = [folder / f"probe-{rank:05d}.json" for rank in range(num_ranks)]
    for path in files:
        path.unlink(missing_ok=True)
    arguments = ["train.probe", "--timeout", f"{max(1.0, left_s - MARGIN_S):.1f}"]
    arguments += ["--json", str(folder.absolute() / "probe-{rank}.json")]
    ranks = place.rank_step(arguments, num_ranks, left_s)
    ranks_said, data_said = ranks.wait(), data.wait()
    verdicts = [judge_world(num_ranks, config.data.packs_per_step)]
    for number, node in enumerate(place.nodes):
        task = data_said.task(number)
        verdicts.append(judge_data(node, _record(task.out), _complaint(task, data_said)))
    errors = [_main_line(task.err) for task in ranks_said.tasks.values()]
    return verdicts + judge_probe(
        {rank: _read(path) for rank, path in enumerate(files)},
        [place.nodes[rank // ranks_per_node] for rank in range(num_ranks)],
        attention=config.model.attention,
        needs_gpu=needs_gpu and not _is_cpu(),
        said=next(filter(None, errors), _main_line(ranks_said.told)),
    )


def _data_command(config: Config) -> list[str]:
    patterns = [source.shards for source in config.data.train] + config.data.validation
    where = ["--index-dir", config.data.index_dir] if config.data.index_dir else []
    return ["data_tools.check", *patterns, "--sample", str(NUM_SAMPLES), "--json", *where]


def _record(text: str) -> dict[str, Any] | None:
    """Return the JSON record that a text ends with; a site's prolog may have printed before it."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        return _record(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None


def _complaint(task: Answer, said: Answers) -> str:
    """Return what a task complained of, or srun if it ended early."""
    return _main_line(task.err) or ("" if said.is_late else _main_line(said.told))


def _main_line(text: str) -> str:
    """Return the line that names an error, else the last one."""
    lines = text.strip().splitlines() or [""]
    return next((line for line in lines if _ERROR.match(line)), lines[-1])
