"""Verdicts from what nodes and ranks say: every fault is found, and laid at the right door."""

from dataclasses import replace
from typing import Any

import pytest

from launch.preflight.findings import (
    NodeAnswer,
    Report,
    Verdict,
    Wanted,
    clock_skew,
    compare_nodes,
    conclude,
    judge_data,
    judge_node,
    judge_world,
)
from launch.preflight.probe_findings import judge_probe

GPU = {"index": "0", "name": "NVIDIA H100", "driver": "570.1", "memory_mib": 81559, "used_mib": 4,
       "ecc_errors": 0}  # fmt: skip
GB = 10**9


def node(**changes: Any) -> NodeAnswer:
    """Return the answer of a healthy node at 1000.5 s, asked at 1000 s, here at 1001 s."""
    about: dict[str, Any] = {
        "node": "n1",
        "time_s": 1000.5,
        "cores": 64,
        "python": "3.11.9",
        "gpus": {"list": [GPU, GPU | {"index": "1"}], "error": ""},
        "space": {"run": 1000 * GB, "tmp": 100 * GB, "shm": 100 * GB},
        "folder": {"error": "", "is_shared": True},
        "model": {"files": 5, "bytes": 16 * GB, "error": ""},
        "code": {"revision": "abc", "digest": "123"},
        "packages": {"torch": "2.13.0", "numpy": "2.4"},
        "locks": [],
        "variables": {"NCCL_SOCKET_IFNAME": "ib0"},
    }
    return NodeAnswer(about | changes, 1000.0, 1001.0)


WANTED = Wanted(gpus=2, ranks_per_node=2, checkpoint_bytes=100 * GB)
IS_FULL = {"run": 50 * GB, "tmp": 100 * GB, "shm": 100 * GB}


def faults(verdicts: list[Verdict]) -> dict[str, str]:
    """Return name -> state of what is not ok."""
    return {verdict.name: verdict.state for verdict in verdicts if verdict.state != "ok"}


def test_a_healthy_node_has_a_line_for_each_thing() -> None:
    verdicts = judge_node("n1", node(), WANTED)
    assert not faults(verdicts)
    lines = str(Report(verdicts, {}, 0)).splitlines()
    assert lines[0] == "ok   n1     gpus        2 x NVIDIA H100, driver 570.1"
    assert {line.split()[2] for line in lines} >= {"cores", "disk", "folder", "model", "clock"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"gpus": {"list": [GPU], "error": ""}}, {"gpus": "FAIL"}),
        ({"gpus": {"list": [], "error": "nvidia-smi: lost"}}, {"gpus": "FAIL"}),
        ({"gpus": {"list": [], "error": ""}}, {"gpus": "warn"}),
        ({"gpus": {"list": [GPU, GPU | {"ecc_errors": 2}], "error": ""}}, {"ecc": "FAIL"}),
        ({"gpus": {"list": [GPU, GPU | {"used_mib": 30000}], "error": ""}}, {"memory": "FAIL"}),
        ({"gpus": {"list": [GPU, GPU | {"used_mib": 2000}], "error": ""}}, {"memory": "warn"}),
        ({"cores": 2}, {"cores": "warn"}),
        ({"space": IS_FULL}, {"disk": "FAIL"}),
        ({"space": IS_FULL | {"run": 150 * GB}}, {"disk": "warn"}),
        ({"space": {"run": 900 * GB, "tmp": 10**7, "shm": 10**7}}, {"tmp": "FAIL", "shm": "FAIL"}),
        ({"space": {"run": 900 * GB, "tmp": 10**9, "shm": 10**8}}, {"tmp": "warn", "shm": "warn"}),
        ({"folder": {"error": "Permission denied: x", "is_shared": False}}, {"folder": "FAIL"}),
        ({"folder": {"error": "", "is_shared": False}}, {"folder": "FAIL"}),
        ({"model": {"files": 0, "bytes": 0, "error": "FileNotFoundError"}}, {"model": "FAIL"}),
        ({"model": {"files": 0, "bytes": 0, "error": ""}}, {"model": "FAIL"}),
        ({"time_s": 1005.0}, {"clock": "warn"}),
        ({"time_s": 900.0}, {"clock": "FAIL"}),
        ({"locks": [{"path": "l", "age_s": 999, "done": "removed"}]}, {"locks": "warn"}),
        ({"locks": [{"path": "l", "age_s": 9, "done": "young"}]}, {"locks": "warn"}),
        ({"locks": [{"path": "l", "age_s": 999, "done": "held"}]}, {}),
    ],
)
def test_each_fault_of_a_node_is_found(change: dict[str, Any], expected: dict[str, str]) -> None:
    verdicts = judge_node("n1", node(**change), WANTED)
    assert faults(verdicts) == expected
    assert all(verdict.node == "n1" for verdict in verdicts)


def test_what_failed_is_read_last() -> None:
    verdicts = judge_node("n1", node(gpus={"list": [], "error": "lost"}, cores=2), WANTED)
    assert (verdicts[0].state, verdicts[-1].state) == ("FAIL", "ok")
    states = [verdict.state for verdict in conclude(verdicts).verdicts]
    assert states == ["ok"] * (len(states) - 2) + ["warn", "FAIL"]


def test_the_time_from_question_to_answer_is_no_skew() -> None:
    assert clock_skew(1030.0, 1000.0, 1040.0) == 0  # srun took half a minute to start
    assert clock_skew(1050.0, 1000.0, 1040.0) == 10
    assert clock_skew(995.0, 1000.0, 1040.0) == -5


def test_the_odd_one_out_is_named_with_the_difference() -> None:
    other = {"torch": "2.12.0", "numpy": "2.4"}
    verdicts = compare_nodes({"n1": node(packages=other), "n2": node(), "n3": node()})
    (wrong,) = [verdict for verdict in verdicts if verdict.state == "FAIL"]
    assert (wrong.name, wrong.node, wrong.is_user) == ("packages", "n1", True)
    assert "torch 2.12.0 (other nodes: 2.13.0)" in wrong.detail and "numpy" not in wrong.detail


@pytest.mark.parametrize(
    ("change", "name", "code"),
    [
        ({"code": {"revision": "abc", "digest": "9"}}, "code", 2),
        ({"python": "3.12.1"}, "python", 2),
        ({"gpus": {"list": [GPU | {"driver": "550.2"}] * 2, "error": ""}}, "driver", 70),
        ({"gpus": {"list": [GPU | {"name": "NVIDIA A100"}] * 2, "error": ""}}, "gpu model", 70),
        ({"model": {"files": 5, "bytes": 15 * GB, "error": ""}}, "model size", 70),
    ],
)
def test_of_two_nodes_the_first_one_is_right(change: dict[str, Any], name: str, code: int) -> None:
    report = conclude(compare_nodes({"n1": node(), "n2": node(**change)}))
    assert [(v.name, v.node) for v in report.verdicts if v.state == "FAIL"] == [(name, "n2")]
    assert report.exit_code == code
    assert list(report.bad_nodes) == (["n2"] if code == 70 else [])


def test_other_network_settings_are_a_warning() -> None:
    verdicts = compare_nodes({"n1": node(), "n2": node(variables={"NCCL_SOCKET_IFNAME": "eth0"})})
    assert faults(verdicts) == {"variables": "warn"}


def test_a_single_node_is_compared_with_none() -> None:
    assert compare_nodes({"n1": node()}) == []


def judged(**changes: dict[str, Any]) -> Report:
    return conclude([v for n, c in changes.items() for v in judge_node(n, node(**c), WANTED)])


def test_what_all_nodes_lack_is_the_users_and_what_one_lacks_is_that_nodes() -> None:
    missing = {"model": {"files": 0, "bytes": 0, "error": "FileNotFoundError"}}
    one = judged(n1={}, n2=missing)
    assert one.exit_code == 70 and list(one.bad_nodes) == ["n2"]
    everywhere = judged(n1=missing, n2=missing)
    assert everywhere.exit_code == 2 and not everywhere.bad_nodes
    assert [v.node for v in everywhere.verdicts if v.state == "FAIL"] == ["all"]


def test_gpus_that_are_missing_on_all_nodes_are_still_the_nodes_fault() -> None:
    report = judged(n1={"gpus": {"list": [GPU], "error": ""}})
    assert report.exit_code == 70 and list(report.bad_nodes) == ["n1"]


def test_equal_lines_of_all_nodes_become_one() -> None:
    report = judged(n1={}, n2={}, n3={"time_s": 900.0})
    nodes = {(v.name, v.node) for v in report.verdicts}
    assert ("gpus", "all") in nodes and ("clock", "n3") in nodes and ("clock", "n1") in nodes
    many = judged(**{f"n{i}": {} for i in range(9)}, x={"time_s": 900.0})
    assert ("clock", "9 nodes") in {(v.name, v.node) for v in many.verdicts}


@pytest.mark.parametrize(("ranks", "state"), [(8, "ok"), (3, "warn"), (16, "FAIL")])
def test_ranks_must_not_be_more_than_packs(ranks: int, state: str) -> None:
    verdict = judge_world(ranks, 8)
    assert verdict.state == state and (state != "FAIL" or verdict.is_user)


def checked(bad: int) -> dict[str, Any]:
    first = {"shard": "a.tar", "key": "k", "problem": "crc32"}
    kinds = {"checksum": {"count": bad, "first": first}} if bad else {}
    return {"samples": 64, "shards": 9, "is_clean": not bad, "bad_samples": bad, "by_kind": kinds}


@pytest.mark.parametrize(("bad", "state"), [(0, "ok"), (1, "warn"), (7, "FAIL")])
def test_a_share_of_bad_samples_fails_and_one_warns(bad: int, state: str) -> None:
    verdict = judge_data("n1", checked(bad), "")
    assert verdict.state == state and verdict.node == "n1"
    assert not bad or "a.tar k: crc32" in verdict.detail


def test_shards_that_cannot_be_read_fail_with_the_reason() -> None:
    assert judge_data("n1", None, "DataError: no shard matches x").detail.startswith("DataError")
    assert "no answer in time" in judge_data("n1", None, "").detail


def rank(number: int, **changes: Any) -> dict[str, Any]:
    """Return what a rank that is well on an H100 writes."""
    device = {"type": "cuda", "name": "NVIDIA H100", "memory_gb": 85.0, "torch": "2.13.0"}
    kernel = {"tolerance": 0.03, "output": 0.004}
    return {
        "rank": number, "phase": "done", "state": "fit", "problem": "", "missing": [],
        "device": device, "kernels": {"matmul float32": kernel, "varlen": kernel, "sdpa": kernel},
        "all_reduce": {"latency_us": 30.0, "algbw_gb_s": 100.0, "busbw_gb_s": 180.0},
    } | changes  # fmt: skip


NODES = ["n1", "n1", "n2", "n2"]
LATE = {"phase": "arrival", "state": "alone", "problem": "ranks that did not arrive: 3"}


def probed(
    *changes: dict[str, Any] | None, attention: str = "auto", said: str = ""
) -> list[Verdict]:
    results = {n: None if c is None else rank(n, **c) for n, c in enumerate(changes)}
    return judge_probe(results, NODES, attention=attention, needs_gpu=True, said=said)


def failing(verdicts: list[Verdict]) -> list[tuple[str, str]]:
    return [(v.name, v.node) for v in verdicts if v.state == "FAIL"]


def test_ranks_that_are_well() -> None:
    verdicts = probed({}, {}, {}, {})
    assert not faults(verdicts)
    texts = [f"{v.name} {v.detail}" for v in verdicts]
    assert "device 2 x NVIDIA H100, 85.0 GB, torch 2.13.0" in texts
    assert "all-reduce 4 ranks, 30 us, 100.00 GB/s (180.00 GB/s a link)" in texts


def test_a_rank_without_a_word_is_the_one_that_is_named() -> None:
    alone = LATE | {"missing": [3]}
    verdicts = probed(alone, alone, alone, None)
    assert failing(verdicts) == [("probe", "n2")] and "rank 3" in verdicts[0].detail


def test_when_rank_0_is_missing_the_others_are_not_blamed() -> None:
    alone = LATE | {"missing": [0]}
    verdicts = probed(None, alone, alone, alone)
    assert failing(verdicts) == [("probe", "n1")] and "rank 0" in verdicts[0].detail


def test_a_rank_that_cannot_reach_rank_0_is_the_one_that_is_named() -> None:
    alone = LATE | {"missing": [3]}
    verdicts = probed(alone, alone, alone, LATE | {"missing": [0]})
    assert failing(verdicts) == [("probe", "n2")] and "rank 3" in verdicts[0].detail


def test_when_nobody_reaches_rank_0_it_is_the_network() -> None:
    cut = LATE | {"missing": [0]}
    verdicts = probed(LATE | {"missing": [1, 2, 3]}, cut, cut, cut)
    assert failing(verdicts) == [("all-reduce", "all")]


def test_a_rank_whose_kernels_are_wrong_is_named_and_not_those_srun_ended() -> None:
    busy = {"phase": "arrival", "state": "busy"}
    wrong = {"phase": "kernels", "state": "wrong", "problem": "varlen, dq: off by 0.7"}
    verdicts = probed(busy, None, wrong, busy)
    assert failing(verdicts) == [("probe", "n2")] and "off by 0.7" in verdicts[0].detail


def test_a_rank_that_hangs_before_the_others_is_named_with_its_phase() -> None:
    stuck = {"phase": "all-reduce", "state": "busy"}
    verdicts = probed(stuck, stuck, {"phase": "kernels", "state": "busy"}, stuck)
    assert failing(verdicts) == [("probe", "n2")] and "in phase kernels" in verdicts[0].detail


def test_an_exchange_that_fails_for_all_is_the_networks() -> None:
    broken = {"phase": "all-reduce", "state": "alone", "problem": "NCCL error: timeout"}
    report = conclude(probed(*[broken] * 4))
    assert [(v.name, v.node) for v in report.verdicts if v.state == "FAIL"] == [
        ("all-reduce", "all")
    ]
    assert "NCCL error: timeout" in str(report) and "NCCL_SOCKET_IFNAME" in str(report)
    assert report.exit_code == 70 and not report.bad_nodes


def test_attention_that_cannot_be_imported_is_the_users() -> None:
    report = conclude(probed({}, {}, {}, {}, attention="flash_attention_2"))
    assert report.exit_code == 2 and "install flash-attn" in str(report)


def test_torch_without_gpus_where_they_were_granted_is_the_users() -> None:
    cpu = {"device": {"type": "cpu", "name": "CPU", "torch": "2.13.0"}}
    report = conclude(probed(cpu, cpu, cpu, cpu))
    assert report.exit_code == 2 and "torch sees none" in str(report)


def test_slow_gpus_are_a_warning() -> None:
    slow = {"all_reduce": {"latency_us": 900.0, "algbw_gb_s": 0.2, "busbw_gb_s": 0.3}}
    verdicts = probed({}, slow, {}, {})
    assert faults(verdicts) == {"all-reduce": "warn"} and "plain sockets" in verdicts[-1].detail


def test_a_report_can_be_written_as_json() -> None:
    report = conclude([replace(judge_world(16, 8))])
    assert report.to_json()["verdicts"][0]["state"] == "FAIL" and report.exit_code == 2
