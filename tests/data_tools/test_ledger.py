"""The ledger makes a run's plan again from its files, and finds whatever does not fit."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from data_tools.errors import ConfigError, DataError
from data_tools.examples.encode import ImageSettings
from data_tools.examples.tasks import Recipe
from data_tools.ledger import main, parse_steps
from data_tools.stream.fit import Budgets
from data_tools.stream.plan import DATA_FOLDER, Plan
from data_tools.templates import load_template
from data_tools.views.replay import Replay
from tests.builders import make_sample as document
from tests.builders import write_shard, write_shards
from tests.data_tools.catalogues import make_source

RECIPE = Recipe((load_template("text-en"), load_template("lines-en")), (1.0, 1.0), seed=5)
IMAGES = ImageSettings(784, 200_000)
TOKENS = 250
WIDE_TOKENS = 600  # room for parts of a split answer
EPOCHS = (2, 1)
PACKS = 3


@pytest.fixture(scope="module")
def plan_folder(tmp_path_factory: pytest.TempPathFactory, byte_folder: Path) -> Path:
    """A run folder with a plan over two sources, the first of which is seen twice."""
    folder = tmp_path_factory.mktemp("run") / "stage1"
    shards = [write_shards(folder / "a", [9, 8]), write_shards(folder / "b", [7], first=100)]
    for number, part in enumerate(shards):
        path = folder / DATA_FOLDER / f"train-{number}.catalogue"
        budgets = Budgets(TOKENS, 4 * TOKENS)
        make_source(path, part, byte_folder, IMAGES, RECIPE, budgets)
    Plan(
        settings={"run.seed": "5"},
        catalogues=tuple(f"{DATA_FOLDER}/train-{k}.catalogue" for k in range(2)),
        weights=(2.0, 1.0),
        epochs=EPOCHS,
        token_budget=TOKENS,
        patch_budget=4 * TOKENS,
        packs_per_step=PACKS,
    ).write(folder)
    return folder


@pytest.fixture
def run(plan_folder: Path, tmp_path: Path) -> Path:
    """A run that went to its end, as the trainer writes it down."""
    folder = tmp_path / "stage1"
    folder.mkdir()
    (folder / DATA_FOLDER).symlink_to(plan_folder / DATA_FOLDER)
    (folder / "plan.json").write_text((plan_folder / "plan.json").read_text())
    write_lines(folder / "data.jsonl", steps_of(folder))
    return folder


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of data.jsonl; the global batch grows in the middle of the run."""
    plan = Plan.read(folder)
    sources = plan.open_sources(folder)
    planner = plan.planner(sources, plan.first_state(sources))
    records: list[dict[str, Any]] = []
    while True:
        planner.packs_per_step = PACKS + len(records) % 2
        step = planner.next_step()
        if step is None:
            return records
        record: dict[str, Any] = {
            "step": len(records) + 1,
            "plan_hash": step.plan_hash,
            "packs": len(step.packs),
        }
        if len(records) % 3 == 2:
            record["state"] = planner.state.to_json()
        records.append(record | {"holes": 0})


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def ledger(
    capsys: pytest.CaptureFixture[str], *arguments: str, expected: int = 0
) -> dict[str, Any]:
    assert main([*arguments, "--json"]) == expected
    return json.loads(capsys.readouterr().out)


def test_a_finished_run_is_exact(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ledger(capsys, str(run))
    assert found["is_exact"] and found["problems"] == [] and found["holes"] == []
    assert found["steps_confirmed"] == found["steps_recorded"] == len(steps_of(run)) > 3
    counts = [
        [(e["epoch"], e["size"], e["num_once"], e["is_complete"]) for e in source["epochs"]]
        for source in found["sources"]
    ]
    assert counts == [[(0, 17, 17, True), (1, 17, 17, True)], [(0, 7, 7, True)]]
    assert main([str(run)]) == 0
    out = capsys.readouterr().out
    assert "verdict: exact, every sample was seen exactly once in each of 3 completed epochs" in out


def test_a_run_that_goes_on_is_exact_so_far(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_lines(run / "data.jsonl", read_lines(run / "data.jsonl")[:2])
    found = ledger(capsys, str(run))
    epochs = [epoch for source in found["sources"] for epoch in source["epochs"]]
    assert found["is_exact"] and not any(epoch["is_complete"] for epoch in epochs)
    assert main([str(run)]) == 0
    assert "exact so far" in capsys.readouterr().out


def test_every_step_is_written_with_its_samples(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "seen.jsonl"
    ledger(capsys, str(run), "--out", str(out))
    records = read_lines(out)
    assert [(r["step"], r["plan_hash"]) for r in records] == [
        (r["step"], r["plan_hash"]) for r in read_lines(run / "data.jsonl")
    ]
    seen = [s for record in records for pack in record["packs"] for s in pack]
    assert len(seen) == 2 * 17 + 7
    assert {s["template"] for s in seen} == {"text-en", "lines-en"}
    some = ledger(capsys, str(run), "--steps", "2:3")["seen"]
    assert some == records[1:3]


def test_a_key_is_found_in_every_step_that_saw_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    visits = ledger(capsys, str(run), "--key", "doc-0004")["visits"]
    assert [visit["epoch"] for visit in visits] == [0, 1]
    assert visits[0]["step"] <= visits[1]["step"]
    main([str(run), "--key", "doc-9999"])
    assert "doc-9999: not seen by any step" in capsys.readouterr().out


def test_holes_are_named_and_counted_in_their_epoch(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    visit = ledger(capsys, str(run), "--key", "doc-0004")["visits"][1]
    hole = {"step": visit["step"], "key": "doc-0004", "source": 0, "reason": "cannot be decoded"}
    write_lines(run / "faults.jsonl", [hole])
    found = ledger(capsys, str(run), "--key", "doc-0004")
    assert found["holes"] == [hole] and found["is_exact"]
    assert [e["num_holes"] for e in found["sources"][0]["epochs"]] == [0, 1]
    assert [visit.get("hole") for visit in found["visits"]] == [None, "cannot be decoded"]
    main([str(run)])
    assert "but for 1 holes named above" in capsys.readouterr().out


@pytest.mark.parametrize("change", ["hash", "gap", "packs", "state", "too many"])
def test_whatever_does_not_fit_ends_with_65(
    run: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    records = read_lines(run / "data.jsonl")
    if change == "hash":
        records[1]["plan_hash"] += 1
    elif change == "gap":
        del records[1]
    elif change == "packs":
        records[1]["packs"] -= 1
    elif change == "state":
        records[2]["state"]["cursors"][0] += 1
    else:
        records.append(records[-1] | {"step": len(records) + 1})
    write_lines(run / "data.jsonl", records)
    found = ledger(capsys, str(run), expected=65)
    (problem,) = found["problems"]
    words = {
        "hash": "step 2: the plan made again has the hash",
        "gap": "has step 3 where 2 is due",
        "packs": "step 2: the plan made again has the hash",
        "state": "step 3: the data state",
        "too many": "the plan ends before it",
    }
    assert words[change] in problem
    assert found["steps_confirmed"] < found["steps_recorded"]


def test_another_catalogue_than_the_run_had_is_found(
    run: Path, byte_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_shard(run / "c" / "train-000000.tar", [document(n) for n in range(20, 37)])
    (run / DATA_FOLDER).unlink()
    budgets = Budgets(TOKENS, 4 * TOKENS)
    for number in range(2):
        path = run / DATA_FOLDER / f"train-{number}.catalogue"
        make_source(path, [str(other)], byte_folder, IMAGES, RECIPE, budgets)
    found = ledger(capsys, str(run), expected=65)
    assert "its catalogues or plan.json are not those it ran with" in found["problems"][0]


def test_a_torn_last_line_is_told(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open(run / "data.jsonl", "a", encoding="utf-8") as file:
        file.write('{"step": ')
    found = ledger(capsys, str(run))
    assert found["last_line_is_torn"] and found["steps_confirmed"] == len(steps_of(run))
    main([str(run)])
    assert "the last line of data.jsonl is cut off" in capsys.readouterr().out


def test_a_planner_that_repeats_a_sample_would_be_found(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The counts are taken from the packs, not from the order that the planner goes by."""
    original = Replay.steps

    def twice(self: Replay) -> Any:
        for seen in original(self):
            yield seen
            if seen.number == 2:
                yield seen

    monkeypatch.setattr(Replay, "steps", twice)
    found = ledger(capsys, str(run), expected=65)
    assert sum(e["num_repeated"] for s in found["sources"] for e in s["epochs"]) > 0


def test_a_skipped_step_would_be_found(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    original = Replay.steps
    monkeypatch.setattr(
        Replay, "steps", lambda self: (seen for seen in original(self) if seen.number != 2)
    )
    found = ledger(capsys, str(run), expected=65)
    assert sum(e["num_never"] for s in found["sources"] for e in s["epochs"]) > 0


def test_shards_that_joined_later_belong_to_the_later_epochs(
    tmp_path: Path, byte_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stage1"
    shards = write_shards(folder / "a", [9, 8])
    name, budgets = f"{DATA_FOLDER}/train-0.catalogue", Budgets(TOKENS, 4 * TOKENS)
    settings = (byte_folder, IMAGES, RECIPE, budgets)
    make_source(folder / name, shards[:1], *settings)
    make_source(folder / name, shards, *settings, next_epoch=1)
    Plan({}, (name,), (1.0,), (2,), TOKENS, 4 * TOKENS, PACKS).write(folder)
    write_lines(folder / "data.jsonl", steps_of(folder))
    epochs = ledger(capsys, str(folder))["sources"][0]["epochs"]
    assert [(e["size"], e["num_once"], e["is_complete"]) for e in epochs] == [
        (9, 9, True),
        (17, 17, True),
    ]


def test_parts_of_a_split_answer_count_as_one_visit(
    tmp_path: Path, byte_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "stage1"
    long = [dataclasses.replace(document(n), text=f"line {n}\n" * 200) for n in range(3)]
    shard = write_shard(folder / "a" / "train-000000.tar", [*long, document(7)])
    recipe = Recipe((load_template("text-en"),))
    name = f"{DATA_FOLDER}/train-0.catalogue"
    budgets = Budgets(WIDE_TOKENS, 4 * WIDE_TOKENS)
    source = make_source(
        folder / name, [str(shard)], byte_folder, IMAGES, recipe, budgets, too_long=("split",)
    )
    assert source.num_fitted[1] == 3
    plan = Plan({}, (name,), (1.0,), (1,), WIDE_TOKENS, 4 * WIDE_TOKENS, PACKS)
    plan.write(folder)
    write_lines(folder / "data.jsonl", steps_of(folder))
    found = ledger(capsys, str(folder), "--key", "doc-0001")
    assert found["is_exact"] and found["sources"][0]["epochs"][0]["num_once"] == 4
    assert len(found["visits"]) == found["visits"][0]["windows"] > 1


def test_a_folder_without_a_run_says_what_is_expected(tmp_path: Path, run: Path) -> None:
    with pytest.raises(DataError, match=r"plan\.json does not exist.*runs/NAME/stage1"):
        main([str(tmp_path)])
    (run / "data.jsonl").unlink()
    with pytest.raises(DataError, match=r"data\.jsonl does not exist"):
        main([str(run)])


def test_steps_are_a_range_from_1() -> None:
    assert parse_steps("3") == range(3, 4) and parse_steps("2:4") == range(2, 5)
    for text in ("0:2", "4:2", "a", "2:", ":3"):
        with pytest.raises(ConfigError, match="--steps"):
            parse_steps(text)
