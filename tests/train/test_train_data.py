"""Documents, samples and the order of batches."""

from __future__ import annotations

import json
from array import array
from dataclasses import dataclass
from pathlib import Path

import pytest

from memplan.errors import DataError
from memplan.job.spec import Data, Job
from memplan.train.data import Batches, Document, Samples, build_samples, count_truncated, read_documents


def _read(path: Path, column: str = "text") -> list[Document]:
    return list(read_documents(str(path), column=column, resolve=Path))


def _encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def _samples(*lengths: int) -> Samples:
    """Sample `i` holds the token `i` over and over."""
    offsets = array("q", [0])
    tokens = array("i")
    for index, length in enumerate(lengths):
        tokens.extend([index] * length)
        offsets.append(len(tokens))
    return Samples(tokens, offsets, 0)


# -- reading


def test_rows_texts_and_folders_are_read_in_order(tmp_path: Path) -> None:
    """A folder is its files by name; rows and texts are told apart, empty ones are left out."""
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": " "}\n{"text": "two", "id": 3}\n')
    (tmp_path / "a.md").write_text("# title\n")
    (tmp_path / "c.txt").write_text("")
    (tmp_path / "ignored.csv").write_text("x")

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
    (tmp_path / "data.parquet").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty").mkdir()

    for name, message in {
        "nowhere.jsonl": "does not exist",
        "data.parquet": "none of .jsonl",
        "latin.txt": "not UTF-8",
        "empty": "holds no",
    }.items():
        with pytest.raises(DataError, match=message):
            _read(tmp_path / name)


def test_our_own_documentation_can_be_read() -> None:
    """`memplan-docs` needs no file of the user's."""
    documents = list(read_documents("memplan-docs", column="text", resolve=Path))

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
        list(read_documents(str(tmp_path / "several"), column="text", resolve=Path, split="validation"))


# -- samples


def test_rows_are_truncated_and_texts_are_cut() -> None:
    """A long row loses its end and is counted; a long text becomes several samples and loses nothing."""
    documents = [Document("abcdefg", True), Document("hi", True), Document("klmnopq", False)]

    samples = build_samples(documents, _encode, max_seq_len=3, packing=False)

    assert ["".join(map(chr, samples[index])) for index in range(len(samples))] == ["abc", "hi", "klm", "nop"]
    assert samples.num_truncated == 1


def test_packing_fills_every_sample() -> None:
    """Packed documents follow one another in full samples; what is left at the end is dropped."""
    documents = [Document("abcd", True), Document("ef", True), Document("ghi", False)]

    samples = build_samples(documents, _encode, max_seq_len=4, packing=True)

    assert ["".join(map(chr, samples[index])) for index in range(len(samples))] == ["abcd", "efgh"]
    assert samples.num_truncated == 0


@pytest.mark.parametrize("packing", [False, True])
def test_no_tokens_is_an_error(packing: bool) -> None:
    """Data without one sample that predicts something is refused."""
    with pytest.raises(DataError, match="no sample of 2 tokens"):
        build_samples([Document("a", True)], _encode, max_seq_len=4, packing=packing)


# -- order


def test_the_longest_samples_come_first() -> None:
    """The first micro batch holds the longest samples; every sample still comes once per pass."""
    batches = Batches(_samples(3, 9, 4, 7, 5, 2), 2, 1, seed=1)

    assert {1, 3} == set(batches.sample_indices(1))
    assert set(range(6)) == {index for step in (1, 2, 3) for index in batches.sample_indices(step)}


def test_order_is_a_function_of_seed_and_step() -> None:
    """A step asked for again, alone or from a new object, has the same samples; another seed has others."""
    samples = _samples(*range(2, 40))
    batches = Batches(samples, 2, 3, seed=7)
    forward = [batches.sample_indices(step) for step in range(1, 30)]

    assert forward == [Batches(samples, 2, 3, seed=7).sample_indices(step) for step in range(1, 30)]
    assert forward[::-1] == [batches.sample_indices(step) for step in range(29, 0, -1)]
    assert forward != [Batches(samples, 2, 3, seed=8).sample_indices(step) for step in range(1, 30)]


def test_a_step_may_cross_into_the_next_pass() -> None:
    """A batch larger than what is left of a pass goes on with the next one; no sample comes more often."""
    batches = Batches(_samples(2, 2, 2, 2, 2), 2, 1, seed=0)
    seen = [index for step in range(1, 6) for index in batches.sample_indices(step)]

    assert [seen.count(index) for index in range(5)] == [2] * 5


@pytest.mark.torch
def test_micro_batches_are_padded_on_the_right() -> None:
    """Ids and labels have the width of the longest sequence; labels are -100 on padding only."""
    torch = pytest.importorskip("torch")
    batch = Batches(_samples(4, 2), 2, 1, seed=0).micro_batch(1, 0)

    assert torch.equal(batch.input_ids, torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]]))
    assert torch.equal(batch.labels, torch.tensor([[0, 0, 0, 0], [1, 1, -100, -100]]))


# -- counting what a shorter sequence cuts


@dataclass
class _Loaded:
    job: Job
    base_dir: Path

    def resolve_path(self, text: str) -> Path:
        return self.base_dir / text


def test_truncated_samples_are_counted_without_torch(tmp_path: Path) -> None:
    """Random weights train on bytes: a row of n bytes has n + 1 tokens."""
    lines = [json.dumps({"text": "x" * length}) for length in (5, 9, 10, 11)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    loaded = _Loaded(Job(model="gpt2", weights="random", data=Data(train="train.jsonl")), tmp_path)

    assert count_truncated(loaded, 10) == (4, 2)  # type: ignore[arg-type]
    assert count_truncated(loaded, 12) == (4, 0)  # type: ignore[arg-type]


def test_an_unknown_count_is_none(tmp_path: Path) -> None:
    """Without data, or with a tokenizer that is not here, nothing is guessed."""
    (tmp_path / "train.jsonl").write_text('{"text": "a"}')
    job = Job(model="some/model", data=Data(train="train.jsonl"))

    assert count_truncated(_Loaded(job, tmp_path), 10) is None  # type: ignore[arg-type]
    assert count_truncated(_Loaded(Job(model="gpt2"), tmp_path), 10) is None  # type: ignore[arg-type]
