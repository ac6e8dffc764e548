"""Reading in parts: shares, going on, signals, finished parts; URLs, globs and lists as input."""

import fcntl
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_tools.errors import ConfigError, LaunchError
from inference import documents, parts, predict
from inference.documents import Document, find_documents
from inference.parts import Part, missing
from tests.inference.oracle import know_answers, page, png
from tests.servers import serve_folder, serve_s3

NUM_PAGES = 12
ANSWERS = {number: f"text {number}" for number in range(1, NUM_PAGES + 1)}


def write_pages(folder: Path) -> Path:
    for number in range(1, NUM_PAGES + 1):
        path = folder / f"{'a' if number % 2 else 'b'}" / f"page-{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(page(number)))
    return folder


@pytest.fixture
def pages(tmp_path: Path) -> Path:
    return write_pages(tmp_path / "pages")


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    fsspec.filesystem("memory").store.clear()


def read(model: Path, *words: Any, batch_size: int = 1) -> int:
    options = ("--device", "cpu", "--batch-size", str(batch_size))
    return predict.main([str(model), *map(str, words), *options])


def lines_of(out: Path) -> list[dict[str, Any]]:
    files = sorted(out.glob("part-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def names(found: Iterator[Document]) -> list[str]:
    return [document.name for document in found]


def test_parts_share_the_documents(page_folder, pages, tmp_path, monkeypatch) -> None:
    know_answers(monkeypatch, ANSWERS)
    out = tmp_path / "read"
    for index in range(3):
        assert read(page_folder, pages, "--out", out, "--part", f"{index}/3") == 0
    assert sorted(p.name for p in out.iterdir()) == [
        *(f"part-{n:05d}-of-00003.{end}" for n in range(3) for end in ("done", "jsonl")),
        "read.json",
    ]
    found = lines_of(out)
    assert sorted(record["file"] for record in found) == sorted(names(find_documents([str(pages)])))
    assert {record["text"] for record in found} == set(ANSWERS.values())


def test_a_new_document_does_not_move_the_others() -> None:
    files = [f"s3://bucket/{number}.png" for number in range(1000)]
    counts = [sum(Part(index, 4).holds(file) for file in files) for index in range(4)]
    assert sum(counts) == 1000 and min(counts) > 200
    part = Part(2, 4)
    before = names(missing(map(lambda f: Document((f,)), files), part, parts.Counter()))
    after = names(missing(map(lambda f: Document((f,)), ["x", *files]), part, parts.Counter()))
    assert [name for name in after if name != "x"] == before


def test_an_interrupted_part_goes_on_after_its_last_complete_line(
    page_folder, pages, tmp_path, monkeypatch
) -> None:
    asked = know_answers(monkeypatch, ANSWERS)
    out = tmp_path / "read"
    assert read(page_folder, pages, "--out", out) == 0
    file = out / "part-00000-of-00001.jsonl"
    whole = file.read_bytes()
    for cut in (0, 1, len(whole) // 2, len(whole) - 1):
        (out / "part-00000-of-00001.done").unlink()
        file.write_bytes(whole[:cut])
        asked.clear()
        assert read(page_folder, pages, "--out", out) == 0
        assert file.read_bytes() == whole
        assert len(asked) == NUM_PAGES - whole[:cut].count(b"\n")


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
@pytest.mark.parametrize("out", ["read", "memory://read"])
def test_a_signal_lets_the_batch_end_and_the_part_goes_on(
    page_folder, pages, tmp_path, monkeypatch, number: int, out: str
) -> None:
    monkeypatch.chdir(tmp_path)
    asked = know_answers(monkeypatch, ANSWERS)
    before = signal.getsignal(number)
    answer = predict.Reader.answer

    def signalled(*words: Any, **more: Any) -> Any:
        os.kill(os.getpid(), number)
        return answer(*words, **more)

    with monkeypatch.context() as patch:
        patch.setattr(predict.Reader, "answer", signalled)
        assert read(page_folder, pages, "--out", out) == 75
    assert len(asked) == predict.BATCHES_AHEAD, "the batch that had begun"
    assert signal.getsignal(number) == before
    assert parts.finished(out, Part()) is None
    assert read(page_folder, pages, "--out", out) == 0
    assert sorted(asked) == sorted(ANSWERS), "no page is read twice"
    with fsspec.open(f"{out}/part-00000-of-00001.jsonl") as stream:
        texts = [json.loads(line)["text"] for line in stream]
    assert sorted(texts) == sorted(ANSWERS.values())


def test_typed_twice_it_says_done_and_loads_no_model(
    page_folder, pages, tmp_path, monkeypatch, capsys
) -> None:
    know_answers(monkeypatch, ANSWERS)
    out = tmp_path / "read"
    read(page_folder, pages, "--out", out)
    monkeypatch.setattr(predict.Reader, "load", None)
    capsys.readouterr()
    assert read(page_folder, pages, "--out", out) == 0
    assert "part-00000-of-00001 is done already\n12 documents, 0 could" in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_refused(
    page_folder, pages, tmp_path, monkeypatch
) -> None:
    know_answers(monkeypatch, ANSWERS)
    out = tmp_path / "read"
    read(page_folder, pages, "--out", out, "--part", "0/2")
    for words in (("--part", "1/3"), ("--part", "1/2", "--max-new-tokens", 4)):
        with pytest.raises(ConfigError, match="begun with other settings"):
            read(page_folder, pages, "--out", out, *words)


def test_a_part_that_is_being_written_is_left_alone(page_folder, pages, tmp_path) -> None:
    out = tmp_path / "read"
    out.mkdir()
    with open(out / "part-00000-of-00001.jsonl", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(LaunchError, match="another process writes it") as caught:
            read(page_folder, pages, "--out", out)
    assert caught.value.exit_code == 75


def test_unreadable_documents_are_lines_and_counted(
    page_folder, pages, tmp_path, monkeypatch
) -> None:
    know_answers(monkeypatch, ANSWERS)
    (pages / "a" / "page-03.png").write_bytes(b"no image")
    listed = tmp_path / "list.txt"
    listed.write_text(f"# scans\n{pages}/a/page-03.png\n\n{pages}/gone.png\n{pages}/b/page-02.png")
    assert read(page_folder, "--list", listed, "--out", tmp_path / "one") == 65
    records = lines_of(tmp_path / "one")
    assert [Path(record["file"]).name for record in records] == [
        *("page-03.png", "gone.png", "page-02.png")
    ]
    assert ["error" in record for record in records] == [True, True, False]
    again = ("--list", listed, "--out", tmp_path / "one", "--max-errors", "0.7")
    assert read(page_folder, *again) == 0


def test_a_document_given_twice_is_read_twice(page_folder, pages, tmp_path, monkeypatch) -> None:
    asked = know_answers(monkeypatch, ANSWERS)
    image = pages / "a" / "page-01.png"
    read(page_folder, image, image, "--out", tmp_path / "read")
    assert asked == [1, 1]


def test_files_behind_a_url_are_collected_and_joined(
    page_folder, pages, monkeypatch: pytest.MonkeyPatch
) -> None:
    know_answers(monkeypatch, ANSWERS)
    monkeypatch.setattr(parts, "LINES_A_FILE", 5)
    with monkeypatch.context() as patch:
        patch.setattr(parts._RemoteLines, "finish", lambda self: 1 / 0)  # killed at the end
        with pytest.raises(ZeroDivisionError):
            read(page_folder, pages, "--out", "memory://read/")
    memory = fsspec.filesystem("memory")
    kept = memory.find("/read/part-00000-of-00001.jsonl.d")
    assert [name.rsplit("/", 1)[-1] for name in kept] == [f"00000{n}.jsonl" for n in range(3)]
    asked = know_answers(monkeypatch, ANSWERS)
    assert read(page_folder, pages, "--out", "memory://read/") == 0
    assert asked == []
    assert memory.cat("/read/part-00000-of-00001.jsonl").count(b"\n") == NUM_PAGES
    assert not memory.exists("/read/part-00000-of-00001.jsonl.d")


def test_names_that_are_no_utf8_come_back(tmp_path: Path) -> None:
    with parts.open_part(str(tmp_path), Part(), {}) as lines:
        lines.write([{"file": "a\udcff.png", "text": "é"}])
    with parts.open_part(str(tmp_path), Part(), {}) as lines:
        assert lines.done == {"a\udcff.png": 1}


@pytest.mark.parametrize("text", ["3", "3/3", "-1/2", "a/b", "1/"])
def test_wrong_parts_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="expected K/N"):
        Part.parse(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "nothing to read"),
        (("x", "--part", "0/2"), "need a folder"),
        (("x", "--part", "0/2", "--out", "a.jsonl"), "is a folder of parts"),
    ],
)
def test_options_that_make_no_sense_are_refused(page_folder, words: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(page_folder, *words)


def test_folders_are_walked_in_the_order_of_whole_names(tmp_path: Path) -> None:
    for name in ("b.png", "a/x.png", "a-1.png", "a.png", "a/b/c.jpg", "a/note.txt", "A.PNG"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = names(find_documents([str(tmp_path)]))
    wanted = [str(p) for p in tmp_path.rglob("*") if p.suffix.lower() in (".png", ".jpg")]
    assert found == sorted(wanted)


def test_images_come_one_by_one(pages, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder below is only looked into when its turn has come."""
    looked: list[str] = []
    entries = documents._local_entries
    monkeypatch.setattr(
        documents, "_local_entries", lambda folder: looked.append(folder) or entries(folder)
    )
    found = find_documents([str(pages)])
    next(found)
    assert looked == [str(pages), f"{pages}/a"]


def test_globs_of_local_files(pages, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(pages.parent)
    assert names(find_documents(["pages/*/page-0[12].png"])) == [
        "pages/a/page-01.png",
        "pages/b/page-02.png",
    ]
    assert names(find_documents([f"{pages}/?/page-12.png"])) == [f"{pages}/b/page-12.png"]
    assert len(names(find_documents(["pages/*"]))) == NUM_PAGES, "of folders"
    with pytest.raises(ConfigError, match="matches nothing"):
        find_documents(["pages/*.jpg"])


def test_buckets_folders_globs_and_lists(page_folder, tmp_path, monkeypatch, pages) -> None:
    know_answers(monkeypatch, ANSWERS)
    with serve_s3(pages.parent) as server:
        url = f"{server.url}/pages"
        everything = names(find_documents([url]))
        assert everything == sorted(everything) and len(everything) == NUM_PAGES
        assert everything[0] == f"{url}/a/page-01.png"
        assert names(find_documents([f"{url}/b/*-1?.png"])) == [
            *(f"{url}/b/page-{number}.png" for number in (10, 12))
        ]
        listed = f"{server.url}/list.txt"
        with fsspec.open(listed, "w") as stream:
            stream.write("\n".join([everything[4], f"{url}/gone.png"]))
        out = f"{server.url}/read/"
        assert read(page_folder, "--list", listed, "--out", out, "--max-errors", 1) == 0
        with fsspec.open(f"{out}part-00000-of-00001.jsonl") as stream:
            records = [json.loads(line) for line in stream]
        assert records[0] == {"file": everything[4], "text": "text 9"}
        assert "cannot be read" in records[1]["error"]


def test_pages_of_a_web_server_that_fails_now_and_then(
    page_folder, pages, tmp_path, monkeypatch
) -> None:
    know_answers(monkeypatch, ANSWERS)
    seen: set[str] = set()

    def once(method: str, path: str, number: int) -> str:
        is_first = path not in seen
        seen.add(path)
        return "503" if is_first and method == "GET" else ""

    with serve_folder(pages, faults=once) as server:
        listed = tmp_path / "list.txt"
        listed.write_text(f"{server.url}/a/page-01.png?key=1\n{server.url}/gone.png\n")
        read(page_folder, "--list", listed, "--out", tmp_path / "read")
    records = lines_of(tmp_path / "read")
    assert records[0]["text"] == "text 1"
    assert "error" in records[1]
