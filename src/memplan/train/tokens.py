"""
Text to token ids: the model's own tokenizer where there is one, bytes where the weights are random and there
is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from memplan.errors import DataError, ModelError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class Tokenizer:
    """
    What the data needs of a tokenizer: ids of a whole document, end of text included, and the name it goes
    by.
    """

    name: str
    encode: Callable[[str], list[int]]
    decode: Callable[[list[int]], str]
    save: Callable[[Path], object] | None = None
    """Writes the files of the tokenizer into a folder; None where there are none to write."""


class ByteTokenizer:
    """
    UTF-8 bytes as ids 0 to 255, and 256 for the end of a document.

    >>> tokenizer = ByteTokenizer()
    >>> tokenizer.encode("né"), tokenizer.decode([110, 195, 169, 256])
    ([110, 195, 169, 256], 'né')
    """

    EOS_ID = 256
    VOCAB_SIZE = 257

    def encode(self, text: str) -> list[int]:
        """Ids of one document, `EOS_ID` last."""
        return [*text.encode("utf-8"), self.EOS_ID]

    def decode(self, ids: list[int]) -> str:
        """Text of ids; ends of documents vanish and bytes that are no UTF-8 become U+FFFD."""
        return bytes(token for token in ids if token < self.EOS_ID).decode("utf-8", errors="replace")


def byte_tokenizer(vocab_size: int) -> Tokenizer:
    """
    The byte tokenizer for a model with `vocab_size` embeddings.

    Raises:
        DataError: the vocabulary is too small for 256 bytes and the end of text.
    """
    if vocab_size < ByteTokenizer.VOCAB_SIZE:
        raise DataError(
            f"the model has no tokenizer and its vocabulary of {vocab_size} is too small for bytes "
            f"({ByteTokenizer.VOCAB_SIZE} ids)",
            hint="put the model's tokenizer files beside its config.json",
        )
    plain = ByteTokenizer()
    return Tokenizer("bytes", plain.encode, plain.decode)


def load_tokenizer(reference: str, folder: Path | None, *, weights: str, vocab_size: int) -> Tokenizer:
    """
    The tokenizer of a model; for random weights without one in their folder, bytes.

    What random weights train on depends on the job alone, so the hub and its cache are asked for pretrained
    ones only.

    Args:
        reference: the model as the job names it.
        folder: where it lies if it is local; None for a hub id or a catalogue name.
        weights: `pretrained` or `random`.
        vocab_size: ids must stay below it.

    Raises:
        ModelError: a tokenizer that cannot be loaded, or whose ids exceed the vocabulary.
        DataError: as `byte_tokenizer`.
    """
    if weights == "random" and not has_tokenizer(folder):
        return byte_tokenizer(vocab_size)
    from transformers import AutoTokenizer

    source = str(folder) if folder is not None else reference
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        raise ModelError(
            f"the tokenizer of `{reference}` cannot be loaded: {first_line(error)}",
            hint="put its tokenizer.json beside the weights, or use `--set weights=random` to train on bytes",
        ) from error
    if len(tokenizer) > vocab_size:
        raise ModelError(
            f"the tokenizer of `{reference}` has {len(tokenizer)} tokens, the model {vocab_size} embeddings",
            hint="use the tokenizer that belongs to the weights",
        )
    return _wrap(tokenizer, source)


def has_tokenizer(folder: Path | None) -> bool:
    """Whether a local model folder holds a tokenizer."""
    return folder is not None and any((folder / name).exists() for name in TOKENIZER_FILES)


def _wrap(tokenizer: Any, name: str) -> Tokenizer:
    end = tokenizer.eos_token_id

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        return ids

    return Tokenizer(name, encode, tokenizer.decode, tokenizer.save_pretrained)


def model_path(reference: str, base_dir: Path | None) -> Path | None:
    """The folder or config file that a job names as its model; None for a hub id or a catalogue name."""
    for base in (base_dir, Path.cwd()):
        if base is None:
            continue
        path = base / Path(reference).expanduser()
        if (path.suffix == ".json" and path.is_file()) or (path / "config.json").is_file():
            return path
    return None


def model_folder(reference: str, base_dir: Path | None) -> Path | None:
    """The folder that holds a local model; None if it is not local."""
    path = model_path(reference, base_dir)
    return path.parent if path is not None and path.is_file() else path


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
