"""The probe: what is well passes, what is wrong or absent is named, and nothing takes for ever."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_tools.errors import ConfigError
from tests.launches import ROOT
from train import exchange, kernel_checks
from train.probe import EXIT_ALONE, Result, Watch, parse_arguments, probe
from train.ranks import Ranks, free_port

pytestmark = pytest.mark.timeout(120)

COMMAND = [sys.executable, "-m", "train.probe"]
CPU = torch.device("cpu")
# A rank that arrives and then does nothing more.
ARRIVES_ONLY = """
import time
from train import exchange
from train.ranks import find_ranks
exchange.arrive(find_ranks(), 20)
time.sleep(60)
"""


class Job:
    """Ranks of a probe on this machine, and the files that they write."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self.folder, self.world_size = folder, world_size
        self.port = free_port()
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, rank: int, command: list[str] = COMMAND, timeout_s: float = 30) -> None:
        env = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.world_size),
            "LOCAL_WORLD_SIZE": str(self.world_size), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.port), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        if command is COMMAND:
            options = ["--timeout", str(timeout_s), "--json", str(self.folder / "r-{rank}.json")]
            command = [*command, *options]
        self.processes.append(
            subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        )

    def code(self, rank: int) -> int:
        return self.processes[rank].wait(60)

    def result(self, rank: int) -> dict[str, Any]:
        path = self.folder / f"r-{rank:05d}.json"
        return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    two = Job(tmp_path, 2)
    yield two
    for process in two.processes:
        process.kill()
        process.communicate()


def test_one_process_prints_what_it_found() -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "RANK", "WORLD"))}
    outcome = subprocess.run(
        COMMAND, cwd=ROOT, env=env | {"DS_ACCELERATOR": "cpu"}, capture_output=True, timeout=60
    )
    found = json.loads(outcome.stdout)
    assert outcome.returncode == 0 and (found["state"], found["phase"]) == ("fit", "done")
    assert found["device"]["type"] == "cpu" and found["all_reduce"] == {}
    assert set(found["kernels"]) == {"matmul float32", "sdpa"}


def test_two_ranks_meet_and_measure(job: Job) -> None:
    for rank in range(2):
        job.start(rank)
    assert [job.code(rank) for rank in range(2)] == [0, 0]
    for rank in range(2):
        found = job.result(rank)
        assert found["state"] == "fit" and found["rank"] == rank
        speed = found["all_reduce"]
        assert speed["latency_us"] > 0 and speed["algbw_gb_s"] > 0
        assert speed["busbw_gb_s"] == speed["algbw_gb_s"]  # 2 (n - 1) / n is 1 for two ranks


def test_a_rank_that_never_arrives_is_named_within_the_timeout(job: Job) -> None:
    before_s = time.monotonic()
    job.start(0, timeout_s=10)
    assert job.code(0) == EXIT_ALONE
    assert time.monotonic() - before_s < 20
    found = job.result(0)
    assert found["missing"] == [1] and found["problem"] == "ranks that did not arrive: 1"


def test_a_rank_that_cannot_reach_rank_0_names_it(job: Job) -> None:
    job.processes.append(subprocess.Popen(["true"], stderr=subprocess.PIPE, text=True))
    job.start(1, timeout_s=8)
    assert job.code(1) == EXIT_ALONE
    assert job.result(1)["missing"] == [0] and job.result(1)["state"] == "alone"


def test_an_exchange_that_hangs_ends_at_the_timeout(job: Job) -> None:
    before_s = time.monotonic()
    job.start(0, timeout_s=16)
    job.start(1, [sys.executable, "-c", ARRIVES_ONLY])
    assert job.code(0) == EXIT_ALONE
    assert time.monotonic() - before_s < 26
    assert (job.result(0)["phase"], job.result(0)["state"]) == ("all-reduce", "alone")


def run_here(tmp_path: Path, timeout_s: float = 60) -> tuple[int, Result]:
    result = Result(0)
    with Watch(result, tmp_path / "r.json", timeout_s) as watch:
        code = probe(Ranks(), watch)
    assert json.loads((tmp_path / "r.json").read_text())["state"] == result.state
    return code, result


def test_a_wrong_matrix_product_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def multiply(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = a @ b
        product[3, 5] += 1.0  # one value of 65,536
        return product

    monkeypatch.setattr(kernel_checks, "multiply", multiply)
    code, result = run_here(tmp_path)
    assert (code, result.state) == (70, "wrong")
    assert result.problem.startswith("matmul float32, product: off by")


@pytest.mark.parametrize("fault", ["leaks into the next document", "wrong gradient", "NaN"])
def test_a_wrong_attention_kernel_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: torch.Tensor,
        longest: int, is_causal: bool,
    ) -> torch.Tensor:  # fmt: skip
        if fault == "leaks into the next document":
            borders = borders[[0, -1]]
        if fault == "wrong gradient":
            value = value + (value - value.detach()) * 0.01
        output = kernel_checks.sdpa_attention(query, key, value, borders, longest, is_causal)
        return output * float("nan") if fault == "NaN" else output

    monkeypatch.setattr(kernel_checks, "attention_kernels", lambda device: [("varlen", kernel)])
    code, result = run_here(tmp_path)
    assert (code, result.state) == (70, "wrong") and "varlen, language model" in result.problem
    if fault == "wrong gradient":
        assert " dv: off by 0.01" in result.problem and "output" not in result.problem


def test_a_driver_that_fails_is_a_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> dict[str, Any]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(kernel_checks, "describe", fail)
    code, result = run_here(tmp_path)
    assert code == 70 and result.problem == "device: RuntimeError: CUDA error: device-side " + (
        "assert triggered"
    )


def test_a_rank_without_a_gpu_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(RuntimeError, match="local rank 4 has no GPU: this process sees 4"):
        kernel_checks.find_device(4)


def test_a_wrong_sum_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange.dist, "all_reduce", lambda tensor: tensor.add_(1))
    with pytest.raises(RuntimeError, match="the sum over all ranks is 2 to 2, not 3"):
        exchange._timed(Ranks(world_size=2), torch.empty(4), 1)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_the_reference_is_attention_by_its_formula(heads: tuple[int, int], is_causal: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(7, n, 8, generator=generator, dtype=torch.float64)
        for n in (heads[0], heads[1], heads[1])
    )
    borders = torch.tensor([0, 4, 7], dtype=torch.int32)
    found = kernel_checks.plain_attention(q, k, v, borders, 4, is_causal)
    head, token = 3, 5  # the second one of the second document
    kv = head * heads[1] // heads[0]
    seen = range(4, 6) if is_causal else range(4, 7)
    scores = torch.stack([q[token, head] @ k[t, kv] / 8**0.5 for t in seen]).exp()
    wanted = sum(s * v[t, kv] for s, t in zip(scores / scores.sum(), seen, strict=True))
    assert torch.allclose(found[token, head], wanted)


def test_a_time_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="--timeout 0"):
        parse_arguments(["--timeout", "0"])
