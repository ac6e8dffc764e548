"""The loader benchmark: its mix, its clock, and the whole command on a few synthetic pages."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from benchmarks.loader import main, parse_arguments
from benchmarks.loading import environment, equality
from benchmarks.loading.contenders import Contender
from benchmarks.loading.pages import PageSet, make_page_sets
from benchmarks.loading.planning import LengthSource, draw_mix, plan_mix
from benchmarks.loading.report import COLUMNS, Findings, to_json, to_text
from benchmarks.loading.timing import Timing, measure
from data_tools.errors import ConfigError
from data_tools.examples.images import smart_resize
from data_tools.stream.index import iterate_samples

ROOT = Path(__file__).resolve().parents[2]


def test_the_mix_is_the_one_that_is_defined() -> None:
    """Means, tail and share of visual tokens of the 200,000 samples that figures are given for."""
    tokens, patches = draw_mix(200_000)
    assert tokens.mean() == pytest.approx(1960, abs=1)
    assert np.percentile(tokens, 99) == 4668 and tokens.max() == 6910
    assert patches.sum() / 4 / tokens.sum() == pytest.approx(0.757, abs=5e-4)
    again, _ = draw_mix(200_000)
    assert np.array_equal(tokens, again)


def test_pages_of_the_mix_are_counted_as_the_model_sees_them() -> None:
    from benchmarks.loading.planning import MAX_PIXELS, MIN_PIXELS, _patches

    draw = np.random.default_rng(0)
    heights, widths = (np.rint(np.exp(draw.uniform(3, 8.5, 500))) for _ in range(2))
    is_sane = np.maximum(heights, widths) / np.minimum(heights, widths) < 200
    heights, widths = heights[is_sane], widths[is_sane]
    limits = {"min_pixels": MIN_PIXELS, "max_pixels": MAX_PIXELS}
    expected = [
        np.prod(smart_resize(int(h), int(w), **limits)) // 196
        for h, w in zip(heights, widths, strict=True)
    ]
    assert _patches(heights, widths).tolist() == expected


def test_packs_of_the_mix_are_full_and_balanced() -> None:
    mix = draw_mix(20_000)
    for budget in (8192, 16384):
        plan, seconds = plan_mix(*mix, budget, packs_per_step=64, ranks=8)
        # The last packs of the epoch weigh more here than in the 200,000 of the benchmark.
        assert plan.fill > 0.999 and 1 <= plan.balance < 1.04
        assert 0 < seconds < 1e-3


def test_lengths_are_drawn_epoch_after_epoch() -> None:
    source = LengthSource([5, 6], [8, 12])
    assert source.num_draws(3) == 6
    (drawn,) = source.draws(1, 3)
    assert (drawn.source, drawn.epoch, drawn.sample_id) == (1, 1, 1)
    assert (drawn.tokens, drawn.patches) == (6, 12)


def test_rounds_are_interleaved_and_each_starts_with_another_contender() -> None:
    log: list[str] = []

    def contender(name: str) -> Contender:
        def run() -> Iterator[int]:
            log.append(name)
            yield 1

        return Contender(name, run)

    ticks = iter(range(100))
    timings = measure([contender(n) for n in "abc"], 3, clock=lambda: float(next(ticks)))
    assert log == list("abcbcacab")
    assert timings == {name: Timing((1.0, 1.0, 1.0)) for name in "abc"}
    assert Timing((1.0, 4.0, 2.0)).median_s == 2 and Timing((1.0, 4.0, 2.0)).spread == 1.5


def test_what_is_not_installed_is_null_and_said() -> None:
    mix = draw_mix(300)
    plans = {name: plan_mix(*mix, 8192, 4, 2) for name in ("8k", "16k")}
    pages = PageSet("a4", "a.tar", 10, 1.4, 300.0, "composed")
    names = [name for name in COLUMNS if name not in ("hf_fast", "peer")]
    timings = {"a4": {n: Timing((0.5,)) for n in [*names, "exact_finished", "fast_finished"]}}
    found = Findings([pages], timings, {"exact": 0.0, "fast": None}, 8.0, plans, 0.002, 1)
    record = to_json(found)
    assert record["images_per_s"]["a4"] == {
        "hf_slow": 20, "hf_fast": None, "peer": None, "exact": 20, "fast": 20
    }  # fmt: skip
    assert record["max_diff"] == {"exact": 0.0, "fast": None} and found.is_equal
    text = to_text(found)
    assert text.count(environment.MISSING) >= 3 and "with finish on CPU" in text
    worse = Findings([pages], timings, {"exact": 1e-9, "fast": None}, 8.0, plans, 0.002, 1)
    assert not worse.is_equal


def test_a4_pages_are_colour_scans_of_their_size(tmp_path: Path) -> None:
    receipts, a4 = make_page_sets(tmp_path, None, 3)
    assert receipts.num_pages == a4.num_pages == 3 and "synthetic" in receipts.source
    assert 1.2 < a4.megapixels < 1.7
    for sample in iterate_samples([a4.shard]):
        page = sample.images[0]
        assert page.height / page.width == pytest.approx(2**0.5, rel=0.01)
    again = make_page_sets(tmp_path / "again", None, 3)[1]
    assert Path(a4.shard).read_bytes() == Path(again.shard).read_bytes()


@pytest.mark.timeout(240)
def test_the_command_prints_its_record() -> None:
    """In a process of its own: it changes the search path and the number of threads."""
    command = [sys.executable, "-m", "benchmarks.loader", "--pages", "2", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--samples", "500", "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "LECTERN_SHARED"},
    )
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert set(record) == {
        "images_per_s", "max_diff", "queue_bytes_ratio", "fill", "balance_8", "plan_share"
    }  # fmt: skip
    assert set(record["images_per_s"]) == {"receipts", "a4"}
    for speeds in record["images_per_s"].values():
        assert list(speeds) == list(COLUMNS) and speeds["exact"] > 0 and speeds["fast"] > 0
    assert record["max_diff"]["exact"] == 0
    assert record["max_diff"]["fast"] is None or record["max_diff"]["fast"] <= 1e-6
    assert record["queue_bytes_ratio"] == 8
    assert set(record["fill"]) == {"8k", "16k"}


def test_pixels_that_differ_end_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_bench_env() -> None:
        """The test process keeps its search path."""

    monkeypatch.setattr(environment, "add_bench_env", no_bench_env)
    monkeypatch.setattr(environment, "has_torchvision", lambda: False)
    monkeypatch.setattr(environment, "has_energon", lambda: False)
    monkeypatch.setattr(equality, "max_difference", lambda pages, source, mode: 0.25)
    monkeypatch.delenv("LECTERN_SHARED", raising=False)
    assert main(["--pages", "1", "--rounds", "1", "--samples", "200"]) == 1
    assert "0.25 (at most 0)" in capsys.readouterr().out


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError, match="--rounds"):
        parse_arguments(["--rounds", "0"])
