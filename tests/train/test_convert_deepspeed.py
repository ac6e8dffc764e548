"""Checkpoints of DeepSpeed become the same weights under hub names, and execute nothing."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import load_file, save_file

from data_tools.errors import CheckpointError
from tests.harness import FOUR_ZERO_SETTINGS, run_ranks
from tests.train.engines import build_engine, train
from tests.train.tiny import tiny_folder, tiny_model
from train.checkpoint import hub
from train.checkpoint.foreign import load_restricted, open_foreign
from train.convert_deepspeed import convert, match_names
from train.modeling.names import hub_name, is_vision

TAG = "global_step2"
# name -> ZeRO stage, dtype, only the vision encoder is trained, tied head
CASES = {
    "zero3-full": (3, "fp32", False, False),
    "zero3-frozen": (3, "bf16", True, False),
    "zero3-tied": (3, "bf16", False, True),
    "zero2-frozen": (2, "bf16", True, False),
    "zero2-tied": (2, "bf16", False, True),
    "zero1-frozen": (1, "bf16", True, False),
}


def weights_in(engine: Any) -> dict[str, torch.Tensor]:
    """Return every weight as the forward sees it, and every master; a collective."""
    state = {}
    for name, p in engine.module.model.named_parameters():
        with deepspeed.zero.GatheredParameters([p]):
            state[f"weight|{name}"] = p.detach().clone()
        if p.requires_grad:
            state[f"fp32|{name}"] = safe_get_full_fp32_param(p).clone()
    return state


def write(root: Path) -> None:
    for name, (stage, dtype, is_frozen, tied) in CASES.items():
        model = tiny_model(seed=3, tied=tied)
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad_(is_vision(parameter_name) or not is_frozen)
        # several flat groups of a rank, which do not end where a parameter ends
        zero = {**FOUR_ZERO_SETTINGS, "sub_group_size": 20_000} if stage == 3 else None
        engine = build_engine(model, dtype, zero, stage=stage)
        train(engine, 0, 2)
        engine.save_checkpoint(str(root / name), tag=TAG)
        if is_frozen:
            engine.save_checkpoint(
                str(root / f"{name}-left-out"), tag=TAG, exclude_frozen_parameters=True
            )
        state = weights_in(engine)
        if torch.distributed.get_rank() == 0:
            save_file(state, root / f"{name}.safetensors")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a checkpoint of each case, its state, and two base models."""
    root = tmp_path_factory.mktemp("foreign")
    tiny_folder(root / "base")
    tiny_folder(root / "base-tied", tied=True)
    run_ranks(3, write, root, timeout_s=120)  # 3: most parameters are padded
    return root


def base_of(root: Path, name: str) -> Path:
    return root / ("base-tied" if "tied" in name else "base")


def state_of(root: Path, name: str, kind: str) -> dict[str, torch.Tensor]:
    state = load_file(root / f"{name}.safetensors")
    return {hub_name(k.split("|")[1]): v for k, v in state.items() if k.startswith(f"{kind}|")}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return {k: v for path in folder.glob("*.safetensors") for k, v in load_file(path).items()}


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    differing = [n for n in left if left[n].dtype != right[n].dtype or not left[n].equal(right[n])]
    assert not differing, differing[:5]


def in_bf16(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.bfloat16() for name, tensor in state.items()}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", CASES)
def test_the_folder_holds_the_gathered_weights_bit_by_bit(
    root: Path, tmp_path: Path, name: str
) -> None:
    base = base_of(root, name)
    out = convert(root / name, base, tmp_path / "out")
    assert_same(weights_of(out), in_bf16(state_of(root, name, "weight")))
    assert ("lm_head.weight" in weights_of(out)) != ("tied" in name)
    out = convert(root / name / TAG, base, tmp_path / "fp32", dtype="fp32", max_shard_gb=1e-4)
    assert len(list(out.glob("*.safetensors"))) > 2
    written, masters = weights_of(out), state_of(root, name, "fp32")
    assert masters and all(written[hub].equal(master) for hub, master in masters.items())


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["zero3-frozen", "zero2-frozen", "zero1-frozen"])
def test_frozen_parameters_that_were_left_out_come_from_the_base(
    root: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = convert(root / f"{name}-left-out", root / "base", tmp_path / "out")
    assert "27 that it does not hold" in capsys.readouterr().err
    trained = in_bf16(state_of(root, name, "fp32"))
    assert len(trained) == 30
    assert_same(weights_of(out), weights_of(root / "base") | trained)
    assert "27 that it does not hold" in (out / "README.md").read_text()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", ["zero3-tied", "zero2-tied"])
def test_a_head_that_was_the_embedding_is_written_where_the_base_has_one(
    root: Path, tmp_path: Path, name: str
) -> None:
    written = weights_of(convert(root / name, root / "base", tmp_path / "out", dtype="fp32"))
    masters = state_of(root, name, "fp32")
    assert_same(written, masters | {"lm_head.weight": masters["model.embed_tokens.weight"]})


def to_universal(save: Path, out: Path, *options: str) -> Path:
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *options]
    command += ["--input_folder", str(save), "--output_folder", str(out)]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return out


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("name", "options"), [("zero3-frozen", ()), ("zero2-tied", ("--inject_missing_state",))]
)
def test_the_universal_form_holds_the_same_weights(
    root: Path, tmp_path: Path, name: str, options: tuple[str, ...]
) -> None:
    universal = to_universal(root / name / TAG, tmp_path / "u", *options)
    base = base_of(root, name)
    out = convert(universal, base, tmp_path / "out")
    assert_same(weights_of(out), in_bf16(state_of(root, name, "weight")))
    lost = next(universal.glob("zero/*merger.ln_q.weight"))
    shutil.rmtree(lost)
    with pytest.raises(CheckpointError, match=r"merger.ln_q.weight/fp32.pt \(1 of"):
        convert(universal, base, tmp_path / "other")


def edited(source: Path, out: Path, pattern: str, edit: Callable[[Any], Any]) -> Path:
    """Return a copy of a checkpoint in which `edit` changed the content of some files."""
    shutil.copytree(source, out)
    for path in (out / TAG).glob(pattern):
        content = torch.load(path, weights_only=False)
        edit(content)
        torch.save(content, path)
    return out


def renamed(rename: Callable[[str], str]) -> Callable[[Any], None]:
    def edit(content: Any) -> None:
        content["param_shapes"] = [
            {rename(name): shape for name, shape in group.items()}
            for group in content["param_shapes"]
        ]
        for key in ("module", "frozen_param_shapes", "frozen_param_fragments"):
            content[key] = {rename(name): value for name, value in content[key].items()}

    return edit


@pytest.mark.timeout(200)
def test_names_of_older_libraries_and_of_wrappers_are_understood(
    root: Path, tmp_path: Path
) -> None:
    def rename(name: str) -> str:
        hub = hub_name(name.removeprefix("model."))
        return "module.model." + hub.replace("visual.", "visual._orig_mod.")

    name = "zero3-frozen"
    checkpoint = edited(root / name, tmp_path / "old", "*model_states.pt", renamed(rename))
    expected = in_bf16(state_of(root, name, "weight"))
    assert_same(weights_of(convert(checkpoint, root / "base", tmp_path / "out")), expected)
    out = convert(checkpoint, root / "base", tmp_path / "out2", prefix="module.model.")
    assert_same(weights_of(out), expected)
    with pytest.raises(CheckpointError, match=r"27 of 57 parameters are none .* 'module\.' cut"):
        convert(checkpoint, root / "base", tmp_path / "out3", prefix="module.")


def test_a_prefix_is_what_leaves_only_known_names() -> None:
    known = {"model.visual.a", "model.language_model.norm.weight", "lm_head.weight"}
    memory = sorted(known)
    hub = ["lm_head.weight", "model.norm.weight", "visual.a"]
    for prefix in ("", "module.", "model.", "base_model.model.", "_orig_mod.", "actor.model."):
        for names in (memory, hub):
            found = match_names([prefix + name for name in names], known)
            assert found == dict(zip([prefix + n for n in names], memory, strict=True))
    assert match_names(["model.model.visual.a"], known) == {"model.model.visual.a": memory[2]}
    with pytest.raises(CheckpointError, match=r"each of these prefixes cut off: \['', 'b\.'\]"):
        match_names(["b.a.w"], {"a.w", "b.a.w"})
    assert match_names(["b.a.w"], {"a.w", "b.a.w"}, prefix="b.") == {"b.a.w": "a.w"}
    with pytest.raises(CheckpointError, match=r"1 of 4 .*\['value_head.weight'\]"):
        match_names([*hub, "value_head.weight"], known)
    with pytest.raises(CheckpointError, match="two parameters of the checkpoint are model.visual"):
        match_names(["visual.a", "model.visual.a"], known)
    with pytest.raises(CheckpointError, match="adapter .LoRA.*merge_and_unload"):
        match_names(["base_model.model.visual.a.lora_A.default.weight"], known)


class Command:
    """What an attacker would put into a pickle."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.text,)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("kind", ["model", "optim"])
def test_a_program_in_a_checkpoint_is_refused_and_not_run(
    root: Path, tmp_path: Path, kind: str
) -> None:
    proof = tmp_path / "was-run"
    checkpoint = edited(
        root / "zero3-full",
        tmp_path / "bad",
        f"*zero_pp_rank_1_*{kind}_states.pt",
        lambda content: content.update(client=Command(f"touch {proof}")),
    )
    with pytest.raises(CheckpointError, match=rf"rank_1_.*{kind}_states.pt contains posix.system"):
        convert(checkpoint, root / "base", tmp_path / "out")
    assert not proof.exists()
    assert not (tmp_path / "out").exists()


def test_deepspeed_s_own_classes_become_stand_ins_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    scaler = DynamicLossScaler(2.0**16, 2.0, 1000, 1, 2, dtype=torch.float16)
    torch.save({"scaler": scaler}, path)
    loaded = load_restricted(path)["scaler"]
    assert type(loaded) is not DynamicLossScaler and loaded.cur_scale == 2.0**16
    torch.save({"path": Path("x")}, path)
    with pytest.raises(CheckpointError, match=r"file.pt contains pathlib\..*PosixPath"):
        load_restricted(path)


@pytest.mark.timeout(200)
def test_files_that_are_missing_left_over_or_damaged_are_named(root: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    shutil.copytree(root / "zero3-full", checkpoint)
    save = checkpoint / TAG
    optimizers, models = (sorted(save.glob(f"*{kind}_states.pt")) for kind in ("optim", "model"))

    def refused(match: str) -> None:
        with pytest.raises(CheckpointError, match=match):
            convert(checkpoint, root / "base", tmp_path / "out")

    for path, kind in ((optimizers[1], "optim"), (models[1], "model")):
        path.rename(tmp_path / "away")
        refused(rf"is incomplete: 3 ranks wrote it, and the \*_{kind}_states.pt of rank 1 is not")
        (tmp_path / "away").rename(path)
    surplus = save / optimizers[2].name.replace("rank_2", "rank_3")
    shutil.copy(optimizers[2], surplus)
    refused("rank_3_mp_rank_00_optim_states.pt does not belong to a checkpoint of 3 ranks")
    surplus.rename(save / f"bf16_{optimizers[2].name}")
    refused("are both of rank 2: files of two saves")
    (save / f"bf16_{optimizers[2].name}").unlink()
    content = optimizers[2].read_bytes()
    optimizers[2].write_bytes(content[: len(content) // 2])
    refused(r"rank_2_mp_rank_00_optim_states.pt cannot be read .* cut off")
    shutil.copy(root / "zero3-frozen" / TAG / f"bf16_{optimizers[2].name}", optimizers[2])
    refused(r"rank_2_mp_rank_00_optim_states.pt holds \d+ elements, expected \d+ of 3 ranks")
    for path in optimizers:
        path.unlink()
    refused("there are neither .*optim_states.pt nor .*fp32.pt")
    for path in models:
        path.unlink()
    refused(f"no checkpoint '{TAG}' .tags there: none; `latest` names it")
    assert not (tmp_path / "out").exists()


def test_a_tag_is_needed_where_latest_is_missing(root: Path, tmp_path: Path) -> None:
    checkpoint = tmp_path / "c"
    shutil.copytree(root / "zero2-frozen" / TAG, checkpoint / "step10")
    shutil.copytree(root / "zero2-frozen" / TAG, checkpoint / "step20")
    (checkpoint / "logs").mkdir()
    with pytest.raises(CheckpointError, match=r"choose one with --tag .tags there: step10, step20"):
        open_foreign(checkpoint)
    with pytest.raises(CheckpointError, match=r"no checkpoint 'step5' .tags there: step10, step20"):
        open_foreign(checkpoint, "step5")
    assert open_foreign(checkpoint, "step10").folder == checkpoint / "step10"
    (checkpoint / "latest").write_text("../../elsewhere")
    with pytest.raises(CheckpointError, match="no checkpoint '../../elsewhere'"):
        open_foreign(checkpoint)


@pytest.mark.timeout(200)
def test_another_model_is_refused(root: Path, tmp_path: Path) -> None:
    checkpoint = root / "zero3-frozen"
    tensors = weights_of(root / "base")

    def refused(match: str, base: dict[str, torch.Tensor], source: Path = checkpoint) -> None:
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        shutil.copytree(root / "base", tmp_path / "base")
        save_file(base, tmp_path / "base" / "model.safetensors")
        with pytest.raises(CheckpointError, match=match):
            convert(source, tmp_path / "base", tmp_path / "out")

    more = {**tensors, "model.layers.2.mlp.up_proj.weight": torch.zeros(2)}
    refused(r"holds no model.language_model.layers.2.mlp.up_proj.weight \(1 parameters", more)
    fewer = {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}
    refused(r"1 of 57 .* for example \['model.model.language_model.norm.weight'\]", fewer)
    other = {**tensors, "visual.merger.ln_q.weight": torch.zeros(5)}
    refused(r"merger.ln_q.weight has shape \[32\], in .*base \[5\]", other)

    def forget(content: Any) -> None:
        content["frozen_param_fragments"].popitem()

    bad = edited(checkpoint, tmp_path / "bad", "zero_pp_rank_1_*model_states.pt", forget)
    refused("rank_1_mp_rank_00_model_states.pt holds no part of model.lm_head.weight", tensors, bad)
    with pytest.raises(CheckpointError, match="holds a head of its own .*tie_word_embeddings"):
        convert(checkpoint, root / "base-tied", tmp_path / "out")
    with pytest.raises(CheckpointError, match="mixes files of steps 2, 7"):
        mixed = edited(
            checkpoint,
            tmp_path / "mixed",
            "zero_pp_rank_2_*model_states.pt",
            lambda content: content.update(global_steps=7),
        )
        convert(mixed, root / "base", tmp_path / "out")


@pytest.mark.timeout(200)
def test_the_folder_is_whole_and_a_second_run_is_done(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, base, out = root / "zero3-frozen", root / "base", tmp_path / "out"
    original = hub.write_safetensors
    written: list[str] = []

    def write_two(path: Path, *arguments: Any, **options: Any) -> int:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        return original(path, *arguments, **options)

    monkeypatch.setattr(hub, "write_safetensors", write_two)
    with pytest.raises(KeyboardInterrupt):
        convert(checkpoint, base, out, max_shard_gb=1e-4)
    assert not out.exists()
    monkeypatch.setattr(hub, "write_safetensors", original)
    half = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".tmp-*/*.safetensors")}
    assert len(half) == 2
    convert(checkpoint, base, out, max_shard_gb=1e-4)
    assert {name: (out / name).stat().st_mtime_ns for name in half} == half
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for name in ("tokenizer.json", "preprocessor_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (base / name).read_bytes()
    marker = json.loads((out / "export.json").read_text())
    assert marker["step"] == 2 and marker["layout"] == "ZeRO-3 on 3 ranks"
    assert str(checkpoint) in (out / "README.md").read_text()

    command = [sys.executable, "-m", "train.convert_deepspeed", str(checkpoint)]
    command += ["--model", str(base), "--out", str(out)]
    convert(checkpoint, base, out)
    assert "is done already" in capsys.readouterr().err
    other = subprocess.run([*command, "--dtype", "fp16"], capture_output=True, text=True)
    assert other.returncode == 2
    assert "holds something else" in other.stderr and "Traceback" not in other.stderr
    convert(checkpoint, base, out, dtype="fp16", force=True)
    assert json.loads((out / "config.json").read_text())["torch_dtype"] == "float16"
    with pytest.raises(CheckpointError, match="base/nowhere is no Hugging Face folder"):
        convert(checkpoint, base / "nowhere", out)


def test_converting_does_not_import_deepspeed() -> None:
    code = "import sys, train.convert_deepspeed; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
