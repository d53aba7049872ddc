"""The byte tokenizer, and which tokenizer a job trains with."""

from __future__ import annotations

from pathlib import Path

import pytest

from memplan.errors import DataError
from memplan.train.documents import Document
from memplan.train.samples import MASKED
from memplan.train.tokens import ByteTokenizer, byte_tokenizer, load_tokenizer, model_folder


@pytest.mark.parametrize("text", ["", "plain", "né — 日本語 🙂", "\x00\n\t"])
def test_bytes_round_trip(text: str) -> None:
    """Any text comes back from its ids, which are below 257 and end with the end of text."""
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)

    assert text == tokenizer.decode(ids)
    assert ids[-1] == 256
    assert all(0 <= token < ByteTokenizer.VOCAB_SIZE for token in ids)


def test_bytes_need_257_embeddings() -> None:
    """A vocabulary without room for every byte and the end of text is refused, with both numbers."""
    assert byte_tokenizer(257).name == "bytes"
    with pytest.raises(DataError, match=r"256.*257 ids"):
        byte_tokenizer(256)


def test_random_weights_without_a_tokenizer_train_on_bytes(tmp_path: Path) -> None:
    """A hub id or a folder without tokenizer files means bytes for random weights, without asking anyone."""
    assert load_tokenizer("some/model", None, weights="random", vocab_size=1000).name == "bytes"
    assert load_tokenizer("here", tmp_path, weights="random", vocab_size=1000).name == "bytes"


def test_a_local_model_is_a_folder_or_a_config_file(tmp_path: Path) -> None:
    """Both name the folder that tokenizer and weights lie in; anything else is not local."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")

    assert folder == model_folder("model", tmp_path)
    assert folder == model_folder("model/config.json", tmp_path)
    assert model_folder("org/name", tmp_path) is None


@pytest.mark.torch
def test_the_tokenizer_of_the_folder_is_used(tmp_path: Path) -> None:
    """A folder's own tokenizer wins over bytes, and documents get its end of text."""
    pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<eos>": 0, "<unk>": 1, "a": 2, "b": 3}, "<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", "unk_token": "<unk>"}'
    )

    loaded = load_tokenizer("here", tmp_path, weights="random", vocab_size=4)

    assert loaded.tokenize(Document("a b c", is_row=True)) == [2, 3, 1, 0]
    masked = loaded.tokenize(Document("a b c", is_row=True, trained=((2, 5),)))
    assert masked == [2 | MASKED, 3, 1, 0]
    assert loaded.tokenize(Document("a b", is_row=False, is_last=False)) == [2, 3]
