"""The GPU check without a GPU: its code path on a CPU, its refusals, its reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu import attention, check, speed, step, workload
from benchmarks.gpu.results import StepResult, write_report
from train.kernel_checks import sdpa_attention

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_dry_run_passes_and_writes_json_and_markdown(tmp_path, capsys):
    code = check.main(
        ["--device", "cpu", "--tiny", "--repetitions", "2", "--out", str(tmp_path / "new")]
    )
    assert code == 0
    record = json.loads((tmp_path / "new/gpu-check.json").read_text())
    steps = {result["name"]: result for result in record["steps"]}
    assert {result["status"] for result in steps.values()} == {"passed", "measured", "skipped"}
    assert steps["step: loss of a pack is that of its documents"]["status"] == "passed"
    for stage in (1, 2):
        values = steps[f"speed: stage {stage}"]["values"]
        assert values["tokens/s"] > 0 and values["documents"] == 4
    page = (tmp_path / "new/gpu-check.md").read_text()
    assert page == capsys.readouterr().out
    assert "| speed: stage 2 | measured |" in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_runs_and_the_code_is_zero(tmp_path):
    script = ROOT / "benchmarks/gpu/check.sh"
    environment = os.environ | {"PYTHON": sys.executable}
    for options in ([], ["--out", str(tmp_path / "none")]):
        done = subprocess.run(
            [str(script), *options], capture_output=True, text=True, env=environment, check=False
        )
        assert (done.returncode, done.stdout) == (0, "no NVIDIA GPU: skipped\n"), done.stderr
    assert not (tmp_path / "none").exists()


def test_kernel_that_lets_documents_see_each_other_fails(monkeypatch):
    def one_document(query, key, value, borders, longest, causal):
        whole = torch.tensor([0, len(query)])
        return sdpa_attention(query, key, value, whole, longest, causal)

    monkeypatch.setattr(attention, "_kernels", lambda device: [("wrong", one_document)])
    results = attention.check_attention(CPU, tiny=True)
    assert [result.status for result in results] == ["failed", "failed"]
    assert "output" in results[0].reason and "dv" in results[0].reason


def test_loss_that_leaks_between_documents_fails():
    model = workload.make_model(CPU, tiny=True)
    whole = workload.make_batch(model, tiny=True)
    singles = [workload.make_batch(model, tiny=True, numbers=[n]) for n in range(4)]
    assert step._check_loss(model, whole, singles, CPU).status == "passed"
    assert step._check_loss(model, whole, singles[:3], CPU).status == "failed"


def test_out_of_memory_halves_the_documents(monkeypatch):
    seen = []

    def measure(model, batch, device, repetitions):
        seen.append(len(batch.keys))
        if len(batch.keys) > 1:
            raise torch.OutOfMemoryError("no room")
        return [StepResult("speed", "measured")]

    monkeypatch.setattr(speed, "_measure", measure)
    assert speed.measure_speed(CPU, tiny=True)[0].status == "measured"
    assert seen == [4, 2, 1]


def test_nothing_fits_is_a_skip_with_its_reason(monkeypatch):
    monkeypatch.setattr(speed, "_try_measure", lambda *arguments: None)
    assert speed.measure_speed(CPU, tiny=True)[0].reason == "one document does not fit into memory"


def test_missing_package_skips_and_a_defect_fails_a_step():
    def missing():
        raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    def broken():
        raise ZeroDivisionError("x")

    def broken_checkout():
        raise ModuleNotFoundError("no train.x", name="train.x")

    assert check._run("step", broken_checkout)[0].status == "failed"
    assert check._run("step", missing)[0].reason == "transformers is not installed"
    failed = check._run("step", broken)[0]
    assert (failed.status, failed.reason) == ("failed", "ZeroDivisionError: x")


def test_failed_step_ends_the_check_with_the_code_of_a_defect(monkeypatch, tmp_path):
    failing = [("step", lambda: [StepResult("step", "failed", "a | b")])]
    monkeypatch.setattr(check, "_steps", lambda *arguments: failing)
    assert check.main(["--device", "cpu", "--tiny", "--out", str(tmp_path)]) == 70
    assert "| step | failed | a / b |" in (tmp_path / "gpu-check.md").read_text()


def test_stage_1_trains_the_vision_encoder_only():
    model = workload.make_model(CPU, tiny=True)
    trained = sum(p.numel() for p in workload.set_stage(model, 1))
    assert trained == sum(p.numel() for p in model.model.model.visual.parameters())
    assert sum(p.numel() for p in workload.set_stage(model, 2)) == sum(
        p.numel() for p in model.model.parameters()
    )


def test_fixed_documents_have_their_published_size():
    with torch.device("meta"):
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        config = Qwen2_5_VLConfig(**workload._mid_size_config())
        model = Qwen2_5_VLForConditionalGeneration(config)
    assert 0.3e9 < sum(p.numel() for p in model.parameters()) < 0.6e9
    tokens = [25 + rows * columns // 4 + answer for rows, columns, answer in workload.DOCUMENTS]
    assert tokens == [3439, 2559, 2333, 1211, 2175, 1105, 135, 99]


def test_report_shortens_figures(tmp_path):
    result = StepResult("s", "measured", values={"MFU": 0.123456, "documents": 8})
    assert "MFU 0.1235; documents 8" in write_report(tmp_path, {"device": "CPU"}, [result])
