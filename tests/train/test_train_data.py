"""Samples, their order and the tensors of micro batches."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest

from memplan.errors import DataError
from memplan.job.spec import Data, Job
from memplan.train.data import Batches
from memplan.train.documents import Document
from memplan.train.order import Permutation
from memplan.train.samples import ID_BITS, MASKED, START, Samples, SampleWriter, build_samples
from memplan.train.truncation import count_truncated


def _encode(document: Document) -> list[int]:
    return [ord(letter) for letter in document.text]


def _samples(*lengths: int) -> Samples:
    """Sample `i` holds the token `i` over and over."""
    writer = SampleWriter()
    for index, length in enumerate(lengths):
        writer.add(array("i", [index | START, *[index] * (length - 1)]))
    return writer.finish()


def _words(samples: Samples) -> list[str]:
    """The samples as text, a bar before each start, masked letters in capitals."""
    return [
        "".join(
            "|" * bool(token & START)
            + (chr(token & ID_BITS).upper() if token & MASKED else chr(token & ID_BITS))
            for token in samples[index]
        )
        for index in range(len(samples))
    ]


# -- samples


def test_rows_are_truncated_and_texts_are_cut() -> None:
    """A long row loses its end and is counted; a long text becomes several samples and loses nothing."""
    documents = [Document("abcdefg", True), Document("hi", True), Document("klmnopq", False)]

    samples = build_samples(documents, _encode, max_seq_len=3, packing=False)

    assert _words(samples) == ["|abc", "|hi", "|klm", "|nop"]
    assert list(samples.targets) == [2, 1, 2, 2]
    assert samples.num_truncated == 1


def test_packing_fills_every_sample() -> None:
    """
    Packed documents follow one another in full samples, and one that does not fit goes on in the next; what is left at
    the end is dropped. Nothing is learnt on the first token of a piece.
    """
    documents = [Document("abcd", True), Document("ef", True), Document("ghi", False)]

    samples = build_samples(documents, _encode, max_seq_len=4, packing=True)

    assert _words(samples) == ["|abcd", "|ef|gh"]
    assert list(samples.targets) == [3, 2]
    assert samples.num_truncated == 0


def test_blocks_of_a_text_are_one_document() -> None:
    """Samples run on across the blocks of a long text, packed or not."""
    blocks = [Document("abcde", False, is_last=False), Document("fgh", False, is_first=False)]

    assert _words(build_samples(blocks, _encode, max_seq_len=3, packing=False)) == ["|abc", "|def", "|gh"]
    assert _words(build_samples(blocks, _encode, max_seq_len=8, packing=True)) == ["|abcdefgh"]


def test_samples_with_nothing_to_learn_are_left_out() -> None:
    """A row whose completion was cut off is counted and left out; only such rows are an error."""

    def tokenize(document: Document) -> list[int]:
        return [ord(letter.lower()) | MASKED * letter.isupper() for letter in document.text]

    rows = [Document("ABcd", True), Document("WXYz", True)]
    samples = build_samples(rows, tokenize, max_seq_len=3, packing=False)

    assert _words(samples) == ["|ABc"]
    assert (samples.num_truncated, samples.num_empty, list(samples.targets)) == (2, 1, [1])
    with pytest.raises(DataError, match="nothing to learn"):
        build_samples(rows[1:], tokenize, max_seq_len=3, packing=False)


def test_the_digest_tells_data_apart() -> None:
    """Equal tokens cut elsewhere, other tokens and other masks are other data; the same data is the same."""
    digests = [
        build_samples([Document(text, True) for text in texts], _encode, max_seq_len=9, packing=False).digest
        for texts in (["ab", "cde"], ["abc", "de"], ["ab", "cdf"], ["ab", "cde"])
    ]

    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


@pytest.mark.parametrize("packing", [False, True])
def test_no_tokens_is_an_error(packing: bool) -> None:
    """Data without one sample that predicts something is refused."""
    with pytest.raises(DataError, match="no sample of 2 tokens"):
        build_samples([Document("a", True)], _encode, max_seq_len=4, packing=packing)


# -- order


def test_the_longest_samples_come_first() -> None:
    """
    The two longest samples are the last of steps 1 and 2, however the global batch is divided; every sample still comes
    once per pass, and the other passes are as they were.
    """
    samples = _samples(3, 9, 4, 7, 5, 2)
    for seed in range(20):
        batches = Batches(samples, 2, 1, seed=seed)
        plain = Batches(samples, 2, 1, seed=seed, longest_first=False)

        assert (batches.sample_indices(1)[-1], batches.sample_indices(2)[-1]) == (1, 3)
        assert [batches.sample_at(place) for place in range(12)] == [
            Batches(samples, 1, 2, seed=seed).sample_at(place) for place in range(12)
        ]
        assert set(range(6)) == {index for step in (1, 2, 3) for index in batches.sample_indices(step)}
        assert batches.sample_indices(4) == plain.sample_indices(4)


def test_the_order_is_a_shuffle() -> None:
    """Every size has all its items once, the inverse is the inverse, and no place prefers an item."""
    for size in (1, 2, 3, 7, 64, 65, 1000):
        order = Permutation(size, "key")
        items = [order[position] for position in range(size)]
        assert sorted(items) == list(range(size))
        assert [order.position(item) for item in items] == list(range(size))
    counts = Counter((place, Permutation(5, f"{key}")[place]) for key in range(4000) for place in range(5))
    assert len(counts) == 25
    # 800 each; five standard deviations of a binomial with 4000 draws of 1/5 are 126.
    assert all(674 < count < 926 for count in counts.values())


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
    """Ids and labels have the width of the longest sequence; labels are -100 on padding and on the first token."""
    torch = pytest.importorskip("torch")
    batch = Batches(_samples(4, 2), 2, 1, seed=0, longest_first=False)._collate([0, 1])

    assert torch.equal(batch.input_ids, torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0]]))
    assert torch.equal(batch.labels, torch.tensor([[-100, 0, 0, 0], [-100, 1, -100, -100]]))
    assert batch.token_mask is not None
    assert torch.equal(batch.token_mask.sum(1), torch.tensor([4, 2]))


@pytest.mark.torch
def test_masks_become_labels_and_packing_positions() -> None:
    """No label where nothing is learnt, on starts neither; positions restart at 0 with packing, and only there."""
    torch = pytest.importorskip("torch")
    writer = SampleWriter()
    writer.add(array("i", [7 | START, 8, 9 | MASKED, 5 | START, 6]))
    samples = writer.finish()

    batch = Batches(samples, 1, 1, seed=0, packing=True).micro_batch(1, 0)

    assert torch.equal(batch.input_ids, torch.tensor([[7, 8, 9, 5, 6]]))
    assert torch.equal(batch.labels, torch.tensor([[-100, 8, -100, -100, 6]]))
    assert batch.position_ids is not None
    assert torch.equal(batch.position_ids, torch.tensor([[0, 1, 2, 0, 1]]))
    assert Batches(samples, 1, 1, seed=0).micro_batch(1, 0).position_ids is None
    assert Batches(samples, 1, 1, seed=0).num_targets(1) == 2
    flat = Batches(samples, 2, 1, seed=0, packing=True, flatten=True).micro_batch(1, 0)
    assert flat.position_ids is not None
    assert torch.equal(flat.position_ids, torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 0, 1]]))
    assert flat.input_ids.shape == flat.labels.shape == (1, 10)


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
