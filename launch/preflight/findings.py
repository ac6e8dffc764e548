"""From what nodes and ranks say of themselves to verdicts: pure functions, no effects.

A verdict that fails is either the user's to mend (a path, a setting, a full disk that all share) or
the fault of one node, which can be left out.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from data_tools.errors import EXIT_DEFECT, EXIT_DONE, EXIT_USER

EVERYWHERE = "all"
STATES = ("ok", "warn", "FAIL")  # in the order of a report: what matters most is read last
GB = 1e9
CLOCK_WARN_S, CLOCK_FAIL_S = 2.0, 10.0
USED_WARN_MIB, USED_FAIL_SHARE = 1536, 0.1  # a driver itself takes some hundred MiB of a GPU
TMP_FAIL_BYTES, TMP_WARN_BYTES = 100 * 2**20, 2**30
SHM_FAIL_BYTES, SHM_WARN_BYTES = 16 * 2**20, 2**30  # NCCL and loaders exchange data there
RUN_FAIL_BYTES = 2**30  # where no estimate of a checkpoint is possible
BAD_SAMPLE_SHARE = 0.1
SLOW_GB_S = 1.0  # GPUs that fall back to plain sockets reach less
# A failure of one node, unless all nodes have it: then it is the setting that is wrong.
SHARED_THINGS = ("folder", "model", "data", "disk")
NUM_DIFFERENCES, NODES_NAMED = 4, 3


@dataclass(frozen=True)
class Verdict:
    """One line of a preflight.

    Attributes:
        name: what was looked at.
        state: "ok", "warn" or "FAIL".
        node: that it is about; "all" for all of them.
        detail: what was found and, unless it is ok, what to do.
        is_user: a failure that the user must mend; else it is the node's.
    """

    name: str
    state: str
    node: str
    detail: str
    is_user: bool = False

    def __str__(self) -> str:
        """Return the line that is printed."""
        return f"{self.state:<4} {self.node:<5}  {self.name:<10}  {self.detail}"


@dataclass(frozen=True)
class Report:
    """What a preflight found.

    Attributes:
        verdicts: all of them.
        bad_nodes: node -> why it cannot be used.
        exit_code: 0; 2 if the user must change something; 70 for nodes that cannot be used.
    """

    verdicts: list[Verdict]
    bad_nodes: dict[str, str]
    exit_code: int

    def __str__(self) -> str:
        """Return one line a verdict."""
        return "\n".join(map(str, self.verdicts))

    def to_json(self) -> dict[str, Any]:
        """Return the record that is written and printed."""
        return asdict(self)


@dataclass(frozen=True)
class Wanted:
    """What the nodes are measured against.

    Attributes:
        gpus: of a node, as granted; 0: none, or training is to run on CPUs.
        ranks_per_node: on each node.
        checkpoint_bytes: of one checkpoint; 0 where it cannot be told.
        num_checkpoints: that lie on the disk at a time.
        has_weights: the model's folder must hold weights.
    """

    gpus: int = 0
    ranks_per_node: int = 1
    checkpoint_bytes: int = 0
    num_checkpoints: int = 3
    has_weights: bool = True


@dataclass(frozen=True)
class NodeAnswer:
    """What `launch.preflight.node_check` said on a node, and when.

    Attributes:
        about: its record.
        begin_s: when it was asked, by the clock of who asked, in seconds since 1970.
        end_s: when its answer came.
    """

    about: Mapping[str, Any]
    begin_s: float
    end_s: float


def conclude(verdicts: Sequence[Verdict]) -> Report:
    """Return the report: who is to blame, bad nodes; equal lines as one, failures last."""
    judged = [replace(v, is_user=v.is_user or _fails_everywhere(v, verdicts)) for v in verdicts]
    failed = [v for v in judged if v.state == "FAIL"]
    bad: dict[str, list[str]] = {}
    for verdict in failed:
        if verdict.node != EVERYWHERE and not verdict.is_user:
            bad.setdefault(verdict.node, []).append(f"{verdict.name}: {verdict.detail}")
    code = EXIT_DONE
    if failed:
        code = EXIT_USER if any(v.is_user for v in failed) else EXIT_DEFECT
    in_order = sorted(_merged(judged), key=lambda verdict: STATES.index(verdict.state))
    return Report(in_order, {node: "; ".join(why) for node, why in bad.items()}, code)


def _fails_everywhere(verdict: Verdict, verdicts: Sequence[Verdict]) -> bool:
    """Tell whether all nodes fail in something that they share."""
    return verdict.name in SHARED_THINGS and all(
        other.state == "FAIL" for other in verdicts if other.name == verdict.name
    )


def _merged(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """Put equal lines of several nodes into one."""
    nodes = dict.fromkeys(v.node for v in verdicts if v.node != EVERYWHERE)
    groups: dict[Verdict, list[str]] = {}
    for verdict in verdicts:
        groups.setdefault(replace(verdict, node=""), []).append(verdict.node)
    merged = []
    for verdict, here in groups.items():
        if len(nodes) > 1 and set(here) == set(nodes):
            here = [EVERYWHERE]
        elif verdict.state == "ok" and len(here) > NODES_NAMED:
            here = [f"{len(here)} nodes"]
        merged += [replace(verdict, node=node) for node in dict.fromkeys(here)]
    return merged


def judge_node(node: str, answer: NodeAnswer, wanted: Wanted) -> list[Verdict]:
    """Return the verdicts of one node that need no look at the others."""
    about = answer.about
    verdicts = [
        *_judge_gpus(about["gpus"], wanted),
        _judge_cores(about["cores"], wanted),
        *_judge_space(about["space"], wanted),
        *_judge_folder(about["folder"]),
        *_judge_model(about["model"], wanted),
        *_judge_locks(about["locks"]),
        _judge_clock(about["time_s"], answer),
    ]
    return [replace(verdict, node=node) for verdict in verdicts]


def _judge_gpus(found: Mapping[str, Any], wanted: Wanted) -> list[Verdict]:
    gpus = found["list"]
    if found["error"]:
        return [_fail("gpus", f"{found['error']}; take the node out and have it looked at")]
    if not gpus:
        if not wanted.gpus:
            return [_ok("gpus", "none")]
        return [_warn("gpus", "nvidia-smi is not in PATH: GPUs are looked at by the probe only")]
    if len(gpus) < wanted.gpus:
        return [_fail("gpus", f"{len(gpus)} of {wanted.gpus} are there: take the node out")]
    verdicts = [_ok("gpus", f"{len(gpus)} x {gpus[0]['name']}, driver {gpus[0]['driver']}")]
    for gpu in gpus:
        if gpu["ecc_errors"]:
            verdicts.append(
                _fail(
                    "ecc",
                    f"GPU {gpu['index']}: {gpu['ecc_errors']} uncorrected memory errors since its "
                    "driver was loaded; have it reset (nvidia-smi --gpu-reset) or replaced",
                )
            )
        used, total = gpu["used_mib"] or 0, gpu["memory_mib"] or 0
        if used > USED_WARN_MIB:
            is_bad = used > USED_FAIL_SHARE * total
            detail = (
                f"GPU {gpu['index']}: {used} of {total} MiB are in use by others; look with "
                "nvidia-smi for processes of an ended job and end them"
            )
            verdicts.append(_fail("memory", detail) if is_bad else _warn("memory", detail))
    return verdicts


def _judge_cores(cores: int, wanted: Wanted) -> Verdict:
    share = cores // wanted.ranks_per_node
    if share < 1 or (wanted.gpus and share < 2):
        return _warn(
            "cores",
            f"{cores} for {wanted.ranks_per_node} ranks: images are decoded by the CPU; ask for "
            "more with --cpus-per-task",
        )
    return _ok("cores", f"{cores} a node, ranks a node: {wanted.ranks_per_node}")


def _judge_space(free: Mapping[str, int], wanted: Wanted) -> list[Verdict]:
    verdicts = []
    if (run := free.get("run")) is not None:
        one = max(wanted.checkpoint_bytes, RUN_FAIL_BYTES)
        need = wanted.checkpoint_bytes * wanted.num_checkpoints
        text = f"{run / GB:.1f} GB free in the run folder, a checkpoint takes {one / GB:.1f} GB"
        if run < one:
            verdicts.append(_fail("disk", f"{text}: make room, or move run.dir"))
        elif run < need:
            verdicts.append(_warn("disk", f"{text} and {wanted.num_checkpoints} may lie there"))
        else:
            verdicts.append(_ok("disk", f"enough free in the run folder for {one / GB:.1f} GB"))
    for name, place, fail_bytes, warn_bytes, advice in (
        ("tmp", "the temporary folder", TMP_FAIL_BYTES, TMP_WARN_BYTES, "empty it or set TMPDIR"),
        ("shm", "/dev/shm", SHM_FAIL_BYTES, SHM_WARN_BYTES, "remove what ended jobs left there"),
    ):
        size = free.get(name)
        if size is not None and size < warn_bytes:
            text = f"{size / 1e6:.0f} MB free in {place}: {advice}"
            verdicts.append(_fail(name, text) if size < fail_bytes else _warn(name, text))
    return verdicts


def _judge_folder(found: Mapping[str, Any] | None) -> list[Verdict]:
    if found is None:
        return []
    if found["error"]:
        return [_fail("folder", f"the run folder takes no file ({found['error']}): mend run.dir")]
    if not found["is_shared"]:
        return [
            _fail(
                "folder",
                "the run folder is not the one that the first node sees: run.dir must lie on a "
                "file system that all nodes share",
            )
        ]
    return [_ok("folder", "takes and keeps files")]


def _judge_model(found: Mapping[str, Any] | None, wanted: Wanted) -> list[Verdict]:
    if found is None:
        return []
    if found["error"]:
        return [_fail("model", f"model.path cannot be read ({found['error']})")]
    if wanted.has_weights and not found["files"]:
        return [_fail("model", "model.path holds no .safetensors: download its weights")]
    return [_ok("model", f"weight files: {found['files']}, {found['bytes'] / GB:.3g} GB")]


def _judge_locks(locks: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    texts = {
        "removed": "a killed build had left {path}, {age_s} s ago, at which every start would have "
        "waited: removed",
        "young": "{path} is {age_s} s old and nobody here holds it: if no other node is building, "
        "remove it, or starts wait for ever",
    }
    return [_warn("locks", texts[k["done"]].format_map(k)) for k in locks if k["done"] in texts]


def _judge_clock(time_s: float, answer: NodeAnswer) -> Verdict:
    skew_s = clock_skew(time_s, answer.begin_s, answer.end_s)
    if abs(skew_s) <= CLOCK_WARN_S:
        return _ok("clock", f"agrees within {CLOCK_WARN_S:g} s")
    text = f"is {abs(skew_s):.0f} s {'ahead' if skew_s > 0 else 'behind'}: start its NTP service"
    return _fail("clock", text) if abs(skew_s) > CLOCK_FAIL_S else _warn("clock", text)


def clock_skew(time_s: float, begin_s: float, end_s: float) -> float:
    """Return by how many seconds a node's clock is certainly off; above 0: ahead.

    Args:
        time_s: what it showed.
        begin_s: when it was asked, by the other clock: it looked at its own some time later.
        end_s: when its answer had come, by the other clock.
    """
    return min(0.0, time_s - begin_s) or max(0.0, time_s - end_s)


def compare_nodes(answers: Mapping[str, NodeAnswer]) -> list[Verdict]:
    """Return the verdicts on what must be the same on all nodes; the majority is right.

    What is the same stands in one line.
    """
    about = {node: answer.about for node, answer in answers.items()}
    if len(about) < 2:
        return []
    verdicts = [
        *_compare("code", about, lambda a: tuple(a["code"].values()), _tell_code, is_user=True),
        *_compare("packages", about, lambda a: a["packages"], _tell_packages, is_user=True),
        *_compare("python", about, lambda a: a["python"], _tell_both, is_user=True),
        *_compare("driver", about, lambda a: _of_gpus(a, "driver"), _tell_both),
        *_compare("gpu model", about, lambda a: _of_gpus(a, "name"), _tell_both),
        *_compare("model size", about, lambda a: (a["model"] or {}).get("bytes"), _tell_both),
    ]
    variables = _compare("variables", about, lambda a: a["variables"], _tell_packages)
    verdicts += [replace(v, state="warn") if v.state == "FAIL" else v for v in variables]
    same = ", ".join(verdict.name for verdict in verdicts if verdict.state == "ok")
    differing = [verdict for verdict in verdicts if verdict.state != "ok"]
    return [Verdict("same", "ok", EVERYWHERE, same), *differing] if same else differing


def _compare(
    name: str,
    about: Mapping[str, Mapping[str, Any]],
    value_of: Callable[[Mapping[str, Any]], Any],
    tell: Callable[[Any, Any], str],
    *,
    is_user: bool = False,
) -> list[Verdict]:
    """Compare a value of all nodes with the one that most of them, or else the first, have."""
    values = {node: value_of(record) for node, record in about.items()}
    texts = {node: repr(value) for node, value in values.items()}
    usual = Counter(texts.values()).most_common(1)[0][0]  # of equally many, the first
    right = next(values[node] for node in values if texts[node] == usual)
    wrong = [
        Verdict(name, "FAIL", node, tell(value, right), is_user)
        for node, value in values.items()
        if texts[node] != usual
    ]
    return wrong or [Verdict(name, "ok", EVERYWHERE, "")]


def _of_gpus(about: Mapping[str, Any], key: str) -> list[str]:
    return sorted({gpu[key] for gpu in about["gpus"]["list"]})


def _tell_code(mine: Sequence[str], others: Sequence[str]) -> str:
    return (
        f"revision {mine[0] or '?'}, digest {mine[1]}; other nodes have {others[0] or '?'}, "
        f"{others[1]}: use one clone on a file system that all share, or bring it up to date"
    )


def _tell_packages(mine: Mapping[str, str], others: Mapping[str, str]) -> str:
    names = [n for n in sorted({*mine, *others}) if mine.get(n) != others.get(n)]
    parts = [
        f"{n} {mine.get(n, 'missing')} (other nodes: {others.get(n, 'missing')})"
        for n in names[:NUM_DIFFERENCES]
    ]
    rest = len(names) - NUM_DIFFERENCES
    return ", ".join(parts) + (f" and {rest} more" if rest > 0 else "") + ": make them the same"


def _tell_both(mine: object, others: object) -> str:
    return f"{mine}; other nodes have {others}"


def judge_world(num_ranks: int, packs_per_step: int) -> Verdict:
    """Return the verdict on the number of ranks."""
    if num_ranks > packs_per_step:
        detail = (
            f"{num_ranks} ranks but data.packs_per_step={packs_per_step}: some would never have "
            "data; use fewer ranks or more packs a step"
        )
        return Verdict("world", "FAIL", EVERYWHERE, detail, is_user=True)
    detail = f"{num_ranks} ranks, {packs_per_step} packs a step"
    if packs_per_step % num_ranks:
        detail += ": not a multiple, so that some ranks wait for others in every step"
        return Verdict("world", "warn", EVERYWHERE, detail)
    return Verdict("world", "ok", EVERYWHERE, detail)


def judge_data(node: str, found: Mapping[str, Any] | None, said: str) -> Verdict:
    """Return the verdict on the shards as a node sees them.

    Args:
        node: its name.
        found: what `data_tools.check --sample` printed; None if it printed nothing.
        said: what it complained of otherwise.
    """
    if found is None:
        return replace(
            _fail("data", said or "reading the shards gave no answer in time"), node=node
        )
    text = f"{found['samples']} samples of {found['shards']} shards read"
    if found["is_clean"]:
        return replace(_ok("data", text), node=node)
    first = next(iter(found["by_kind"].values()))["first"]
    text += (
        f", {found['bad_samples']} bad, the first: {first['shard']} {first['key']}: "
        f"{first['problem']}; `python -m data_tools.check SHARDS` lists all"
    )
    is_bad = found["bad_samples"] > max(1, BAD_SAMPLE_SHARE * found["samples"])
    return replace(_fail("data", text) if is_bad else _warn("data", text), node=node)


def _ok(name: str, detail: str) -> Verdict:
    return Verdict(name, "ok", "", detail)


def _warn(name: str, detail: str) -> Verdict:
    return Verdict(name, "warn", "", detail)


def _fail(name: str, detail: str) -> Verdict:
    return Verdict(name, "FAIL", "", detail)
