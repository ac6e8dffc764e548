"""Configuration: strict, all errors at once, overrides, variants, and the guide's settings."""

from pathlib import Path

import pytest

from data_tools.errors import ConfigError
from tests.builders import run_record, write_run
from train.config import load_config, path_problems, reader_settings, write_config

ROOT = Path(__file__).resolve().parents[2]
YOURS = [
    "run.dir=runs/x",
    "model.path=models/tiny-base",
    'data.train=[{shards: "x.tar"}]',
    'data.validation=["y.tar"]',
]


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def valid(tmp_path: Path) -> Path:
    return write_run(tmp_path / "valid.yaml", run_record(tmp_path, tmp_path, ["a.tar"]))


def test_unknown_keys_are_named_with_the_nearest_known_one(valid: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(valid, ["optim.lr_vison=1e-5", "data.max_pixel=1", "stage.patience=3"])
    message = str(caught.value)
    assert "data.max_pixel is not a known key. Did you mean data.max_pixels?" in message
    assert "optim.lr_vison is not a known key." in message
    assert "stage.patience is not a known key." in message


def test_all_errors_are_told_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, "run: {}\noptim: {lr: fast}\nstage: {number: 3}\nmodel: {path: m}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    for part in ("run.dir must be set", "optim.lr", "'fast'", "stage.number", "data must be set"):
        assert part in str(caught.value)


def test_scientific_notation_without_a_dot_is_a_number(valid: Path) -> None:
    assert load_config(valid, ["optim.lr=5e-6"]).optim.lr == 5e-6


def test_override_without_a_value_says_what_is_expected(valid: Path) -> None:
    with pytest.raises(ConfigError, match=r"expected key\.path=value"):
        load_config(valid, ["optim.lr"])


def test_missing_file_names_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")


def test_invalid_yaml_is_one_message(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no valid YAML"):
        load_config(write(tmp_path, "a: [1, 2"))


def test_a_variant_changes_single_keys_of_what_it_extends(tmp_path: Path, valid: Path) -> None:
    path = write(tmp_path, f"extends: {valid.name}\ndata: {{max_pixels: 4096}}\n")
    changed, base = load_config(path), load_config(valid)
    assert changed.data.max_pixels == 4096
    assert changed.data.token_budget == base.data.token_budget


def test_contradictions_are_errors(valid: Path) -> None:
    with pytest.raises(ConfigError, match="min_pixels is larger"):
        load_config(valid, ["data.min_pixels=4096", "data.max_pixels=2048"])
    with pytest.raises(ConfigError, match=r"task\.unit"):
        load_config(valid, ["data.preprocess=[{name: line_strip}]"])


def test_scratch_cannot_leave_random_weights_frozen(valid: Path) -> None:
    for change in ("stage.number=1", "model.adapter={rank: 4}"):
        with pytest.raises(ConfigError, match="trains every weight"):
            load_config(valid, ["model.init=scratch", change])


def test_missing_model_folder_is_named(valid: Path) -> None:
    config = load_config(valid, ["model.path=/no/such"])
    assert path_problems(config) == ["model.path: there is no folder /no/such"]


def test_resolved_configuration_reads_back_equal(tmp_path: Path, valid: Path) -> None:
    config = load_config(valid, ["loss.char_prior={rarity: 0.1}", "model.adapter={rank: 4}"])
    write_config(config, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml") == config


def test_reader_settings_carry_transforms_and_pixel_limits(valid: Path) -> None:
    config = load_config(
        valid, ["task.unit=line", "data.preprocess=[{name: line_strip, stretch: 2.5}]"]
    )
    settings = reader_settings(config.model_dump(mode="json"))
    assert settings["preprocess"][0]["stretch"] == 2.5
    assert settings["unit"] == "line"
    assert settings["max_pixels"] == config.data.max_pixels


# Of stages; tests/launch/test_plan.py looks at the pipelines.
SHIPPED = [p for p in sorted((ROOT / "configs").rglob("*.yaml")) if p.name != "pipeline.yaml"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    if path.name == "common.yaml":
        pytest.skip("holds what the phases share; each of them is tested")
    load_config(path, YOURS)


@pytest.mark.parametrize("folder", [".", "qwen2.5-vl-3b"])
def test_real_configurations_carry_the_guides_settings(folder: str) -> None:
    stages = [load_config(ROOT / f"configs/{folder}/stage{n}.yaml", YOURS) for n in (1, 2)]
    assert [stage.optim.lr for stage in stages] == [5e-5, 1e-5]
    for number, stage in enumerate(stages, start=1):
        assert stage.stage.number == number
        assert 10 <= stage.stage.epochs <= 15
        assert stage.stage.early_stopping is not None
        assert stage.data.token_budget == 16384
        assert stage.data.max_pixels >= 1605632
        assert stage.parallel.precision == "bf16"
        assert stage.optim.warmup_steps > 0
        assert stage.stage.collapse is not None
        assert stage.stage.collapse.max_ratio == 1.5


def test_a_page_of_1024_px_keeps_its_pixels() -> None:
    from data_tools.examples.images import smart_resize

    data = load_config(ROOT / "configs/stage1.yaml", YOURS).data
    height, width = smart_resize(1024, 1024, min_pixels=data.min_pixels, max_pixels=data.max_pixels)
    assert height >= 1024 - 14
    assert width >= 1024 - 14


def test_a_pack_holds_8_to_16_mixed_documents() -> None:
    """The mix of half receipts, a fifth each of line crops and A4 pages, a tenth forms."""
    import numpy as np

    from data_tools.stream.planner import choose_pack

    budget = load_config(ROOT / "configs/stage1.yaml", YOURS).data.token_budget
    draw = np.random.default_rng(0)
    kinds = [(2137, 700), (106, 60), (3114, 700), (2481, 600)]
    sizes = [kinds[i] for i in draw.choice(4, 4000, p=[0.5, 0.2, 0.2, 0.1])]
    tokens = [int(np.clip(draw.normal(mean, spread), 40, budget)) for mean, spread in sizes]
    packs, start = [], 64
    window = tokens[:64]
    while start < len(tokens):
        chosen, _ = choose_pack(window, [0] * len(window), budget, 1)
        packs.append(len(chosen))
        window = [t for i, t in enumerate(window) if i not in set(chosen)]
        refill = 64 - len(window)
        window += tokens[start : start + refill]
        start += refill
    assert 8 <= np.mean(packs) <= 16
