"""From what the ranks of `train.probe` say to verdicts: who is at fault when an exchange fails."""

from collections.abc import Mapping, Sequence
from typing import Any

from launch.preflight.findings import EVERYWHERE, SLOW_GB_S, Verdict

PHASES = ("start", "device", "kernels", "arrival", "all-reduce", "done")
BEST_KERNELS = ("flash_attention_2", "varlen")  # in the order in which `auto` takes them


def judge_probe(
    results: Mapping[int, Mapping[str, Any] | None],
    node_of: Sequence[str],
    *,
    attention: str,
    needs_gpu: bool,
    said: str = "",
) -> list[Verdict]:
    """Return the verdicts on all ranks.

    Args:
        results: by rank; None where a rank has left no word.
        node_of: node of each rank.
        attention: `model.attention` of the configuration.
        needs_gpu: a rank on a CPU is a failure.
        said: what was complained of otherwise.
    """
    verdicts = _wrong(results, node_of) or _absent(results, node_of)
    there = [result for result in results.values() if result is not None]
    if not verdicts and any(result["state"] != "fit" for result in there):
        problems = dict.fromkeys(r["problem"] for r in there if r["problem"])
        detail = "; ".join(problems) or said or "the exchange did not end in time"
        verdicts = [
            Verdict(
                "all-reduce",
                "FAIL",
                EVERYWHERE,
                f"{detail}: look at the network, and at NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME "
                "in slurm/site.sh",
            )
        ]
    for node in dict.fromkeys(node_of):
        here = [r for rank, r in results.items() if node_of[rank] == node and r and r["device"]]
        if here:
            verdicts += _judge_device(node, here, attention, needs_gpu)
    if all(result and result["state"] == "fit" for result in results.values()):
        verdicts += _judge_speed(there)
    return verdicts


def _wrong(
    results: Mapping[int, Mapping[str, Any] | None], node_of: Sequence[str]
) -> list[Verdict]:
    """Return the ranks whose own device or kernels fail: srun has then ended all the others."""
    return [
        Verdict("probe", "FAIL", node_of[rank], f"rank {rank}: {result['problem']}")
        for rank, result in results.items()
        if result is not None and result["state"] == "wrong"
    ]


def _absent(
    results: Mapping[int, Mapping[str, Any] | None], node_of: Sequence[str]
) -> list[Verdict]:
    """Return the ranks that others missed, or that have not come as far as the others."""
    missed = _missed(results)
    reached = {rank: PHASES.index(r["phase"]) if r else -1 for rank, r in results.items()}
    furthest = max(reached.values())
    late = {
        rank
        for rank, result in results.items()
        if reached[rank] < furthest and (result is None or result["state"] == "busy")
    }
    if furthest < 0:
        late = set(results)
    verdicts = []
    for rank in sorted(missed | late):
        result = results.get(rank)
        where = f"in phase {result['phase']}" if result else "without a word"
        detail = f"rank {rank} did not arrive ({where}): take the node out and have it looked at"
        verdicts.append(Verdict("probe", "FAIL", node_of[rank], detail))
    return verdicts


def _missed(results: Mapping[int, Mapping[str, Any] | None]) -> set[int]:
    """Return the ranks that are missed, as far as one of them and not the network is at fault."""
    lists = {
        rank: set(result["missing"])
        for rank, result in results.items()
        if result and result["state"] == "alone"
    }
    if 0 in lists:  # its list is complete; the others know only what they read there
        others = set(results) - {0}
        is_reached_by_none = lists[0] == others and any(lists.get(r) == {0} for r in others)
        return set() if is_reached_by_none else lists[0]
    return set().union(*lists.values())


def _judge_device(
    node: str, here: Sequence[Mapping[str, Any]], attention: str, needs_gpu: bool
) -> list[Verdict]:
    device, kernels = here[0]["device"], here[0]["kernels"]
    if needs_gpu and device["type"] == "cpu":
        detail = (
            "GPUs were granted but torch sees none: install a torch for CUDA (constraints-gpu.txt),"
            " or set DS_ACCELERATOR=cpu to train on CPUs"
        )
        return [Verdict("device", "FAIL", node, detail, is_user=True)]
    memory = f", {device['memory_gb']} GB" if "memory_gb" in device else ""
    versions = [f"{key} {device[key]}" for key in ("torch", "cuda", "nccl") if key in device]
    detail = f"{len(here)} x {device['name']}{memory}, {', '.join(versions)}"
    verdicts = [Verdict("device", "ok", node, detail)]
    if kernels:
        verdicts.append(_judge_kernels(node, device["type"], kernels, attention))
    return verdicts


def _judge_kernels(
    node: str, device_type: str, kernels: Mapping[str, Mapping[str, float]], attention: str
) -> Verdict:
    names = [name for name in kernels if not name.startswith("matmul")]
    wanted = BEST_KERNELS if attention == "auto" else (attention,)
    if device_type == "cuda" and not set(wanted) & set(names):
        detail = (
            f"model.attention={attention} needs {' or '.join(wanted)}, neither can be imported: "
            "install flash-attn (docs/gpu.md)"
        )
        return Verdict("attention", "FAIL", node, detail, is_user=True)
    worst = max(error for n in names for part, error in kernels[n].items() if part != "tolerance")
    detail = f"{', '.join(names)}: as plain attention, values and gradients, within {worst:.1g}"
    return Verdict("attention", "ok", node, detail)


def _judge_speed(results: Sequence[Mapping[str, Any]]) -> list[Verdict]:
    """Return the verdict on the exchange, by the slowest rank."""
    speeds = [result["all_reduce"] for result in results if result["all_reduce"]]
    if not speeds:
        return []
    busbw = min(speed["busbw_gb_s"] for speed in speeds)
    latency = max(speed["latency_us"] for speed in speeds)
    algbw = min(speed["algbw_gb_s"] for speed in speeds)
    detail = f"{len(results)} ranks, {latency:.0f} us, {algbw:.2f} GB/s ({busbw:.2f} GB/s a link)"
    if results[0]["device"]["type"] == "cuda" and busbw < SLOW_GB_S:
        detail += ": NCCL seems to use plain sockets; see NCCL_DEBUG=INFO and slurm/site.sh"
        return [Verdict("all-reduce", "warn", EVERYWHERE, detail)]
    return [Verdict("all-reduce", "ok", EVERYWHERE, detail)]
