"""Lengths, padding, packs and proposals, on data whose answer can be worked out by hand."""

import json
from pathlib import Path

import numpy as np
import pytest

from data_tools.errors import ConfigError
from data_tools.stats import main, parse_budgets
from data_tools.stream.planner import DataState, PlannedSample, Step
from data_tools.views.charts import histogram
from data_tools.views.plans import (
    PIXELS_STEP,
    PUBLISHED_MAX_PIXELS,
    balance,
    describe_plan,
    padded_share,
    propose_max_pixels,
    propose_token_budget,
)
from tests.builders import write_shards


def sample(tokens: int) -> PlannedSample:
    return PlannedSample(0, 0, 0, 0, 0, tokens, 0)


def step(*packs: tuple[int, ...]) -> Step:
    planned = tuple(tuple(sample(tokens) for tokens in pack) for pack in packs)
    return Step(0, planned, DataState.first({}, [""]))


def run(shards: list[str], model: Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    arguments = [*shards, "--model", str(model), "--workers", "1", "--min-pixels", "784"]
    assert main([*arguments, "--packs-per-step", "2", "--ranks", "2", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_padding_of_batches_is_what_their_longest_sample_makes() -> None:
    assert padded_share(np.full(80, 7), 8) == 0
    assert padded_share(np.array([10, 30]), 2) == pytest.approx(1 - 40 / 60)
    assert padded_share(np.array([10]), 8) == 0
    shares = [padded_share(np.array([1, 99] * 400), size) for size in (2, 4, 8)]
    assert shares[0] < shares[1] < shares[2] < 0.5


def test_balance_is_the_slowest_rank_against_an_even_spread() -> None:
    assert balance([step((10,), (10,), (10,), (10,))], 2) == 1
    assert balance([step((30,), (10,))], 2) == pytest.approx(1.5)
    assert balance([step((30,), (30,), (10,), (10,))], 2) == 1  # sorted: neighbours run together
    assert balance([step((10,))], 4) == 4  # three ranks have nothing to do


def test_fill_counts_all_packs_and_balance_only_full_steps() -> None:
    report = describe_plan([step((60, 30), (100,)), step((50,))], 100, 2, 2)
    assert report.fill == pytest.approx(240 / 300)
    assert report.num_packs == 3 and report.num_steps == 2
    assert report.samples_per_pack == pytest.approx(4 / 3)
    assert report.balance == pytest.approx(100 * 2 / 190)


def test_proposals_follow_their_rules() -> None:
    assert propose_token_budget(np.full(100, 1000)).value == 8192  # eight of the mean length
    assert propose_token_budget(np.array([10] * 100 + [20_000] * 50)).value == 65_536
    assert propose_token_budget(np.array([100] * 999 + [10_000])).value == 4096
    pixels = np.array([500_000] * 990 + [9_000_000] * 5)
    assert propose_max_pixels(pixels).value == 3 * PIXELS_STEP >= 500_000
    assert propose_max_pixels(np.full(10, 10**9)).value == PUBLISHED_MAX_PIXELS


def test_histogram_counts_every_sample() -> None:
    values = np.random.default_rng(0).integers(1, 5000, 1000)
    lines = histogram(values, "tokens")
    assert lines[0] == "tokens"
    assert sum(int(line.split()[-1]) for line in lines[1:]) == 1000
    assert histogram(np.array([5, 5]), "same")[1].split() == ["5", "-", "5", "#" * 40, "2"]


def test_report_of_shards(
    tmp_path: Path, byte_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path, [20, 17])
    found = run(shards, byte_folder, capsys, "--budgets", "64,256")
    assert (found["shards"], found["samples"], found["planned_samples"]) == (2, 37, 37)
    tokens = found["tokens"]
    assert tokens["both"]["mean"] == pytest.approx(
        tokens["text"]["mean"] + tokens["visual"]["mean"]
    )
    assert tokens["text"]["p1"] <= tokens["text"]["p50"] <= tokens["text"]["max"]
    wide = found["budgets"]["256"]
    assert wide["left_out"] == 0 and 0 < wide["fill"] <= 1
    assert wide["padding"] == pytest.approx(1 - wide["fill"])
    assert 0 < found["padded"]["padding"] < 1
    assert found["proposal"]["token_budget"]["value"] == 4096
    assert "256 visual tokens" in found["proposal"]["max_pixels"]["rule"]


def test_what_a_small_pack_cannot_hold_is_counted(
    tmp_path: Path, byte_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path, [30])
    limit = run(shards, byte_folder, capsys, "--budgets", "4096")["tokens"]["both"]["p50"]
    small = run(shards, byte_folder, capsys, "--budgets", str(int(limit)))["budgets"]
    (budget,) = small.values()
    assert 0 < budget["left_out"] + budget["shrunk"] < 30
    assert budget["left_out_share"] == budget["left_out"] / 30


def test_a_part_of_many_samples_is_planned(
    tmp_path: Path, byte_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path, [20])
    found = run(shards, byte_folder, capsys, "--samples", "5")
    assert found["samples"] == 20 and found["planned_samples"] == 5


def test_text_and_charts(
    tmp_path: Path, byte_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = write_shards(tmp_path, [12])
    png = tmp_path / "charts.png"
    arguments = ["--model", str(byte_folder), "--workers", "1", "--png", str(png)]
    assert main([*shards, *arguments, "--template", "text-en", "lines-en"]) == 0
    out = capsys.readouterr().out
    for words in ("12 samples in 1 shards", "padding of shuffled batches of 8", "packs of 8192"):
        assert words in out
    assert "proposal: data.token_budget=4096" in out and "smallest power of two" in out
    assert png.read_bytes().startswith(b"\x89PNG")


def test_numbers_out_of_range_are_refused() -> None:
    assert parse_budgets("8192, 16384") == [8192, 16384]
    for text in ("", "8k", "0", "1,"):
        with pytest.raises(ConfigError, match="--budgets"):
            parse_budgets(text)
    with pytest.raises(ConfigError, match="--ranks"):
        main(["a.tar", "--model", "m", "--ranks", "0"])
