"""Rows and texts of every kind of file, and the documents that they become."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from memplan.errors import DataError
from memplan.job.data_names import is_hub_dataset
from memplan.job.spec import Data
from memplan.train import sources
from memplan.train.documents import Document, Reader
from memplan.train.sources import Row, read_source


def _read(path: Path, split: str = "train", **data: Any) -> list[Document]:
    rows = read_source(str(path), resolve=Path, split=split)
    return list(Reader(replace(Data(), **data), None).documents(rows))


# -- reading


def test_rows_texts_and_folders_are_read_in_order(tmp_path: Path) -> None:
    """A folder is its files by name; rows and texts are told apart, empty ones are left out."""
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": " "}\n{"text": "two", "id": 3}\n')
    (tmp_path / "a.md").write_text("# title\n")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "ignored.png").write_text("x")

    assert [Document("# title\n", False), Document("one", True), Document("two", True)] == _read(tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "line 2 is not JSON"),
        ("[1]", "line 2 is a list"),
        ('{"body": "a"}', "line 2 has no column `text`; it has `body`"),
        ('{"text": 3}', "line 2: column `text` holds a int"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    """What is wrong with a row says where it is."""
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")

    with pytest.raises(DataError, match=message) as caught:
        _read(path)
    assert str(path) in str(caught.value)


def test_sources_that_cannot_be_read(tmp_path: Path) -> None:
    """A missing path, an unknown kind, an empty folder and bytes that are no UTF-8 are refused."""
    (tmp_path / "data.png").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty").mkdir()

    for name, message in {
        "nowhere.jsonl": "does not exist",
        "data.png": "none of .jsonl",
        "latin.txt": "not UTF-8",
        "empty": "holds no",
    }.items():
        with pytest.raises(DataError, match=message):
            _read(tmp_path / name)


def test_our_own_documentation_can_be_read() -> None:
    """`memplan-docs` needs no file of the user's."""
    documents = _read(Path("memplan-docs"))

    assert documents
    assert not any(document.is_row for document in documents)


@pytest.mark.torch
def test_a_folder_of_the_datasets_library_is_read(tmp_path: Path) -> None:
    """Saved datasets are rows, of the split asked for where there are several."""
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "several")

    assert [Document("one", True), Document("two", True)] == _read(tmp_path / "several")
    with pytest.raises(DataError, match="no split `validation`; it has `train`"):
        _read(tmp_path / "several", split="validation")


def test_json_csv_and_parquet_hold_the_same_rows(tmp_path: Path) -> None:
    """One table in every format; a list of objects, and objects line by line under the same suffix."""
    pytest.importorskip("pyarrow")
    import pyarrow
    import pyarrow.parquet

    rows = [{"text": 'one,\n"two"', "id": "1"}, {"text": "drei", "id": "2"}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.csv").write_text('text,id\n"one,\n""two""",1\ndrei,2\n')
    (tmp_path / "a.tsv").write_text('text\tid\n"one,\n""two"""\t1\ndrei\t2\n')
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")

    for name in ("a.json", "b.json", "a.csv", "a.tsv", "a.parquet"):
        found = list(read_source(str(tmp_path / name), resolve=Path, split="train"))
        assert rows == [row.fields for row in found if isinstance(row, Row)], name


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"text": "a"}, {"text": "b"', "item 2 is not JSON"),
        ("a.json", '[{"text": "a"}, 3]', "item 2 is a int"),
        ("a.csv", "text,id\na,1\nb\n", "line 3 has not as many cells"),
        ("a.parquet", "nothing of the kind", "cannot be read as Parquet"),
    ],
)
def test_damaged_tables_are_named_by_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    """What is wrong with a table says where it is."""
    pytest.importorskip("pyarrow")
    (tmp_path / name).write_text(content)

    with pytest.raises(DataError, match=message):
        _read(tmp_path / name)


def test_reading_takes_no_more_memory_for_a_larger_file(tmp_path: Path) -> None:
    """JSON, JSON lines and text are read in pieces: a file of 12 MiB takes 3 MiB at most."""
    row = {"text": "word " * 1000}
    (tmp_path / "a.json").write_text(json.dumps([row] * 2400))
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 2400)

    for name in ("a.json", "a.jsonl"):
        tracemalloc.start()
        count = sum(1 for _ in read_source(str(tmp_path / name), resolve=Path, split="train"))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (count, peak < 3 << 20) == (2400, True), (name, peak)


def test_a_long_text_comes_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks end with a line; the first begins the document and the last ends it."""
    monkeypatch.setattr(sources, "TEXT_BLOCK_CHARACTERS", 4)
    (tmp_path / "a.txt").write_text("one\ntwo two\nthree\n")

    documents = _read(tmp_path / "a.txt")

    assert [("one\ntwo two\n", True, False), ("three\n", False, True)] == [
        (document.text, document.is_first, document.is_last) for document in documents
    ]


def test_a_hub_id_is_no_path(tmp_path: Path) -> None:
    """`owner/name` is a hub id unless something of that name is here, or its folder is."""
    (tmp_path / "data").mkdir()

    assert is_hub_dataset("owner/name", tmp_path / "owner/name")
    for path in ("data/trian", "train.jsonl", "owner/train.jsonl", "a/b/c", "./owner/name"):
        assert not is_hub_dataset(path, tmp_path / path), path


# -- prompts and completions


def test_the_loss_of_a_prompt_is_taken_on_its_completion(tmp_path: Path) -> None:
    """A prompt is followed by its completion as it is; only the latter's characters are trained on."""
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "2+2=", "completion": "4"}\n{"prompt": "?", "completion": " "}\n')

    assert [Document("2+2=4", True, ((4, 5),))] == _read(path)
    assert [Document("2+2=4", True)] == _read(path, mask="none")
    path.write_text('{"instruction": "2+2=", "output": "4"}\n')
    assert [Document("2+2=4", True, ((4, 5),))] == _read(
        path, format="prompt", prompt="instruction", completion="output"
    )
    with pytest.raises(DataError, match="has no column `prompt`; it has `instruction`, `output`"):
        _read(path, format="prompt")


def test_a_conversation_needs_a_template(tmp_path: Path) -> None:
    """Without one the row is refused, with what to name."""
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}]}))

    with pytest.raises(DataError, match="has no chat template") as caught:
        _read(path)
    assert "data.chat_template" in (caught.value.hint or "")
