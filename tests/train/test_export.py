"""An export is the trained model: names, values, settings, whole or not there at all."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from data_tools.errors import CheckpointError
from data_tools.templates import load_template
from tests.harness import run_ranks
from tests.train.checkpoint_files import parameters_of, write_checkpoint
from tests.train.engines import build_engine, save, train, whole_state
from tests.train.tiny import tiny_folder, tiny_inputs, tiny_model
from train import export as export_module
from train.checkpoint import SliceReader, hub, read_manifest
from train.checkpoint.manifest import write_manifest
from train.checkpoint.weights import BaseWeights, plan_files
from train.export import export
from train.modeling.names import hub_name, is_vision


def write_stage(run: Path, base: Path, **model: Any) -> Path:
    """Write the config.yaml of a stage that started from `base`; return the stage's folder."""
    stage = run / "stage1"
    stage.mkdir(parents=True, exist_ok=True)
    config = {
        "model": {"path": str(base), "init": "pretrained", "adapter": None, **model},
        "data": {"preprocess": [], "min_pixels": 784, "max_pixels": 50176},
        "task": {"unit": "line", "templates": [{"name": "text-en", "weight": 1.0}]},
    }
    (stage / "config.yaml").write_text(yaml.safe_dump(config))
    return stage


def base_model(base: Path) -> Any:
    """Return the float32 model with the weights of a folder, vision trainable, the rest frozen."""
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_vision(name))
    return model


def write_vision_stage(run: Path, tied: bool = False, step: int = 7) -> tuple[Path, Any]:
    """Return a stage whose checkpoint changed the vision encoder, and the model it holds."""
    base = tiny_folder(run / "base", tied=tied)
    model = base_model(base)
    other = dict(tiny_model(seed=5, tied=tied).named_parameters())
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(other[name])
            trained[f"fp32|{name}"] = parameter.detach()
    stage = write_stage(run, base)
    write_checkpoint(stage / "checkpoints", trained, 3, step, parameters_of(model))
    return stage, model


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def expected(model: Any, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {hub_name(name): p.detach().to(dtype) for name, p in model.named_parameters()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    differing = [n for n in left if left[n].dtype != right[n].dtype or not left[n].equal(right[n])]
    assert not differing, differing[:5]


def train_and_save(base: Path, stage: Path) -> None:
    engine = build_engine(base_model(base), "bf16")
    train(engine, 0, 2)
    save(engine, stage / "checkpoints", 2, {}, keep_last=1)
    state = whole_state(engine)
    if torch.distributed.get_rank() == 0:
        save_file(state, stage / "state.safetensors")


def test_export_of_a_trained_engine_is_bitwise_its_gathered_weights(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    stage = write_stage(tmp_path / "run", base)
    run_ranks(2, train_and_save, base, stage, timeout_s=60)
    out = export(stage)
    assert out == stage / "hf"

    state = load_file(stage / "state.safetensors")
    gathered = {k.split("|")[1]: v for k, v in state.items() if k.startswith("weight|")}
    assert {t.dtype for t in gathered.values()} == {torch.bfloat16}
    assert_same(weights_of(out), {hub_name(name): t for name, t in gathered.items()})
    masters = {k.split("|")[1]: v for k, v in state.items() if k.startswith("fp32|")}
    written = weights_of(export(stage, tmp_path / "fp32", dtype="fp32"))
    assert masters and all(written[hub_name(n)].equal(master) for n, master in masters.items())

    reference = tiny_model()
    for name, parameter in reference.named_parameters():  # not .bfloat16(): it casts inv_freq too
        parameter.data = gathered[name]
    loaded = Qwen2_5_VLForConditionalGeneration.from_pretrained(out, dtype="auto")
    inputs = tiny_inputs(3)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, reference(**inputs).logits)


def test_frozen_weights_come_from_the_base_and_trained_ones_from_the_checkpoint(
    tmp_path: Path,
) -> None:
    stage, model = write_vision_stage(tmp_path)
    assert_same(weights_of(export(stage)), expected(model))
    half = export(stage, tmp_path / "half", dtype="fp16")
    assert_same(weights_of(half), expected(model, torch.float16))


def test_names_are_those_of_the_base_in_one_file_or_many(tmp_path: Path) -> None:
    stage, model = write_vision_stage(tmp_path)
    out = export(stage, tmp_path / "many", max_shard_gb=1e-4)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    with safe_open(tmp_path / "base" / "model.safetensors", framework="pt") as base:
        assert set(index["weight_map"]) == set(base.keys())
    files = sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(2 * p.numel() for p in model.parameters())
    with safe_open(out / files[0], framework="pt") as first:
        assert first.metadata() == {"format": "pt"}
    assert_same(weights_of(out), expected(model))
    # the folder with many files is a base like any other
    assert BaseWeights(out).names == BaseWeights(tmp_path / "base").names


def test_a_tied_head_is_not_written(tmp_path: Path) -> None:
    stage, model = write_vision_stage(tmp_path, tied=True)
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)  # some programs store the same matrix under both names
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, weights)
    written = weights_of(export(stage))
    assert "lm_head.weight" not in written
    assert_same(written, expected(model))


def test_settings_are_the_base_folder_s_with_dtype_and_pixel_limits(tmp_path: Path) -> None:
    stage, _ = write_vision_stage(tmp_path)
    base = tmp_path / "base"
    (base / "LICENSE").write_text("terms")
    (stage / "status.json").write_text(json.dumps({"metrics": {"cer": 0.0123}}))
    mask = os.umask(0o022)
    try:
        out = export(stage, dtype="fp32")
    finally:
        os.umask(mask)
    config = json.loads((base / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16"
    assert json.loads((out / "config.json").read_text()) == {**config, "torch_dtype": "float32"}
    processor = json.loads((base / "preprocessor_config.json").read_text())
    limits = {"min_pixels": 784, "max_pixels": 50176}
    assert json.loads((out / "preprocessor_config.json").read_text()) == processor | limits
    for name in ("generation_config.json", "tokenizer_config.json", "tokenizer.json", "LICENSE"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    reader = json.loads((out / "lectern.json").read_text())
    assert reader["unit"] == "line" and reader["max_pixels"] == 50176
    card = (out / "README.md").read_text()
    assert "step 7" in card and "| cer | 0.0123 |" in card and "vllm serve" in card
    assert {oct(path.stat().st_mode & 0o777) for path in out.iterdir()} == {"0o644"}


def test_the_card_shows_the_metrics_of_its_own_step(tmp_path: Path) -> None:
    stage, _ = write_vision_stage(tmp_path)
    status = {"metrics": {"validation/cer": 0.5}, "metrics_step": 9}
    (stage / "status.json").write_text(json.dumps(status))
    card = (export(stage) / "README.md").read_text()
    assert "| validation/cer | 0.5 |" in card and "Measured at step 9 of the training, not" in card
    records = [{"step": step, "validation/cer": step / 10} for step in (5, 7, 9)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (stage / "log.jsonl").write_text(text + '{"step": 11, "validation/')
    card = (export(stage, tmp_path / "again") / "README.md").read_text()
    assert "| validation/cer | 0.7 |" in card and "not with these weights" not in card


def test_the_card_gives_a_question_of_several_lines_word_for_word(tmp_path: Path) -> None:
    stage, _ = write_vision_stage(tmp_path)
    config = yaml.safe_load((stage / "config.yaml").read_text())
    config["task"]["templates"][0]["name"] = "invoice-fields-zh"
    (stage / "config.yaml").write_text(yaml.safe_dump(config))
    card = (export(stage) / "README.md").read_text()
    prompt = load_template("invoice-fields-zh").prompt
    assert "\n" in prompt and f"```text\n{prompt}\n```" in card
    assert '"repetition_penalty": 1.0' in card


def test_typed_again_it_is_done_and_something_else_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, model = write_vision_stage(tmp_path)
    out = export(stage)
    before = (out / "export.json").stat().st_mtime_ns
    assert export(stage) == out
    assert "done already" in capsys.readouterr().err
    assert (out / "export.json").stat().st_mtime_ns == before
    with pytest.raises(CheckpointError, match="holds something else.*--force"):
        export(stage, dtype="fp32")
    export(stage, dtype="fp32", force=True)
    assert_same(weights_of(out), expected(model, torch.float32))
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds something else"):
        export(stage, dtype="fp32")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("words")
    with pytest.raises(CheckpointError, match="holds something else"):
        export(stage, tmp_path / "mine")


def test_an_interrupted_export_goes_on_and_a_refused_one_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, model = write_vision_stage(tmp_path)
    written: list[str] = []
    original = hub.write_safetensors

    def write_two(path: Path, *arguments: Any, **options: Any) -> int:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return original(path, *arguments, **options)

    monkeypatch.setattr(hub, "write_safetensors", write_two)
    with pytest.raises(KeyboardInterrupt):
        export(stage, max_shard_gb=1e-4)
    assert not (stage / "hf").exists()
    monkeypatch.setattr(hub, "write_safetensors", original)
    times = {path.name: path.stat().st_mtime_ns for path in stage.glob(".tmp-hf-*/*.safetensors")}
    assert len(times) == 2
    out = export(stage, max_shard_gb=1e-4)
    assert {name: (out / name).stat().st_mtime_ns for name in times} == times
    assert_same(weights_of(out), expected(model))
    assert {path.name for path in stage.iterdir()} == {"checkpoints", "config.yaml", "hf"}
    assert not list(out.glob("*.digests.json"))

    def refuse(*_: Any) -> None:
        raise CheckpointError("no")

    monkeypatch.setattr(export_module, "check_weights", refuse)
    with pytest.raises(CheckpointError):
        export(stage, tmp_path / "other")
    assert not list(tmp_path.glob(".tmp-*"))


def test_several_processes_write_the_same_files(tmp_path: Path) -> None:
    stage, model = write_vision_stage(tmp_path)
    one = export(stage, tmp_path / "one", max_shard_gb=1e-4)
    two = export(stage, tmp_path / "two", max_shard_gb=1e-4, workers=2)
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert len(names) > 2
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)
    assert_same(weights_of(two), expected(model))


def write_steps(tmp_path: Path, models: list[Any]) -> Path:
    """Return a stage with checkpoints 1, 2, ... of these models, everything trained."""
    stage = write_stage(tmp_path / "run", tiny_folder(tmp_path / "base"))
    for step, model in enumerate(models, start=1):
        trained = {f"fp32|{name}": p.detach() for name, p in model.named_parameters()}
        write_checkpoint(stage / "checkpoints", trained, step, step, parameters_of(model))
    return stage


def test_checkpoints_are_averaged_uniformly_and_exponentially(tmp_path: Path) -> None:
    models = [tiny_model(seed=seed) for seed in range(4)]
    stage = write_steps(tmp_path, models)
    cases = [
        ({"average": 3}, {1: 1 / 3, 2: 1 / 3, 3: 1 / 3}),
        ({"steps": [4, 1]}, {0: 0.5, 3: 0.5}),
        ({"average": 2, "ema": 0.5}, {2: 1 / 3, 3: 2 / 3}),
    ]
    for number, (options, shares) in enumerate(cases):
        written = weights_of(export(stage, tmp_path / f"out{number}", dtype="fp32", **options))
        for name, weight in expected(models[0], torch.float64).items():
            wanted = torch.zeros_like(weight)
            for which, share in shares.items():
                wanted += share * expected(models[which], torch.float64)[name]
            assert torch.allclose(written[name].double(), wanted, rtol=1e-7, atol=1e-9), name
    card = (tmp_path / "out2" / "README.md").read_text()
    assert "the average of steps 3, 4 (shares 0.333, 0.667)" in card
    with pytest.raises(CheckpointError, match="--average 5, but there are 4 whole checkpoints"):
        export(stage, tmp_path / "out", average=5)


def test_bytes_that_were_written_wrongly_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, _ = write_vision_stage(tmp_path)
    original = export_module.write_weights

    def write_and_spoil(folder: Path, *arguments: Any) -> dict[str, str]:
        files = original(folder, *arguments)
        path = folder / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 4
        path.write_bytes(content)
        return files

    monkeypatch.setattr(export_module, "write_weights", write_and_spoil)
    with pytest.raises(CheckpointError, match=r"what was read back of lm_head.weight is not"):
        export(stage)


def test_lora_is_merged_as_peft_merges_it(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    model = base_model(base)
    settings = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "qkv", "down_proj"])
    model = inject_adapter_in_model(settings, model)
    torch.manual_seed(3)
    trained = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.normal_()
            trained[f"fp32|{name}"] = parameter.detach()
    assert any("lora_B" in key for key in trained)
    table = parameters_of(model)
    stage = write_stage(tmp_path / "run", base, adapter={"rank": 4, "alpha": 12})
    write_checkpoint(stage / "checkpoints", trained, 2, 1, table)
    written = weights_of(export(stage, dtype="fp32"))

    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.merge()
    merged = {
        hub_name(name.replace(".base_layer.", ".")): p.detach()
        for name, p in model.named_parameters()
        if "lora_" not in name
    }
    assert_same(written, merged)
    plain = weights_of(base)
    changed = {name for name in plain if not plain[name].float().equal(written[name])}
    assert len(changed) == 2 + 2 + 4  # q_proj, qkv, down_proj of two layers and two blocks each

    stage = write_stage(tmp_path / "run", base)
    with pytest.raises(CheckpointError, match="an adapter, but model.adapter is not set"):
        export(stage, tmp_path / "other")


def test_a_model_from_scratch_must_be_whole_in_the_checkpoint(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base", seed=8)  # its weights are not what training began with
    model = tiny_model(seed=1)
    stage = write_stage(tmp_path / "run", base, init="scratch")
    trained = {f"fp32|{name}": p.detach() for name, p in model.named_parameters()}
    write_checkpoint(stage / "checkpoints", trained, 2, 1, parameters_of(model))
    assert_same(weights_of(export(stage)), expected(model))
    model.lm_head.weight.requires_grad_(False)
    write_checkpoint(stage / "checkpoints", trained, 2, 2, parameters_of(model))
    with pytest.raises(CheckpointError, match=r"lm_head.weight is not in the checkpoint, and"):
        export(stage, tmp_path / "other")


def test_a_checkpoint_deleted_meanwhile_is_named(tmp_path: Path) -> None:
    stage, _ = write_vision_stage(tmp_path)
    checkpoint = stage / "checkpoints" / "step-00000007"
    reader = SliceReader(checkpoint, read_manifest(checkpoint))
    (checkpoint / "shard-00001-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="shard-00001-of-00003.*cannot be read"):
        reader.read("fp32|model.visual.merger.ln_q.weight", 0, 32)


def test_another_base_model_is_refused(tmp_path: Path) -> None:
    stage, _ = write_vision_stage(tmp_path)
    config = (stage / "config.yaml").read_text()
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    save_file({**tensors, "model.layers.2.mlp.up_proj.weight": torch.zeros(2)}, weights)
    with pytest.raises(CheckpointError, match="holds 1 weights that the trained model has not"):
        export(stage)
    save_file({**tensors, "model.norm.weight": torch.zeros(5)}, weights)
    with pytest.raises(CheckpointError, match=r"norm.weight has shape \[5\], the trained model"):
        export(stage)
    (stage / "config.yaml").write_text(config.replace(str(tmp_path / "base"), "/nowhere"))
    with pytest.raises(CheckpointError, match="model.path is /nowhere, which is no Hugging Face"):
        export(stage)


def test_frozen_weights_that_were_replaced_since_are_refused(tmp_path: Path) -> None:
    """Names and shapes are right, the values are those of another model."""
    stage, model = write_vision_stage(tmp_path)
    checkpoint = stage / "checkpoints" / "step-00000007"
    manifest = read_manifest(checkpoint)
    identity = BaseWeights(tmp_path / "base").identity()
    write_manifest(checkpoint, replace(manifest, base=identity))
    assert_same(weights_of(export(stage)), expected(model))
    tiny_folder(tmp_path / "base", seed=9)
    with pytest.raises(CheckpointError, match=r"its frozen weights are those of .*sha256"):
        export(stage, tmp_path / "other")


def test_the_command_reports_a_user_s_mistake_without_a_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "train.export", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "expected a stage of a run, RUN/stageN" in result.stderr
    assert "Traceback" not in result.stderr


def test_export_does_not_import_deepspeed() -> None:
    code = "import sys, train.export; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_files_are_filled_in_order_up_to_the_limit() -> None:
    sizes = {"a": 4, "b": 4, "c": 9, "d": 1, "e": 7}
    assert plan_files(sizes, 8) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_files(sizes, 100) == [list(sizes)]
