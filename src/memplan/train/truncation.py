"""How many samples of a job's data lose tokens at a length, without torch and without the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from memplan.errors import DataError
from memplan.job.data_names import is_hub_dataset
from memplan.train.documents import Reader
from memplan.train.sources import read_source
from memplan.train.tokens import has_tokenizer, model_folder

if TYPE_CHECKING:
    from memplan.job.load import LoadedJob


def count_truncated(loaded: LoadedJob, max_seq_len: int) -> tuple[int, int] | None:
    """
    How many samples the job's data has, and how many of them lose tokens at `max_seq_len`.

    Text files and packed data are cut, not truncated, and lose none. Needs no torch: a model folder's
    `tokenizer.json` is read with `tokenizers`, and random weights without one train on bytes.

    Returns:
        (samples, longer), or None where the data or the tokenizer cannot be read here.
    """
    job = loaded.job
    if job.data.train is None:
        return None
    lengths = _length_function(loaded)
    if lengths is None or is_hub_dataset(job.data.train, loaded.resolve_path(job.data.train)):
        return None
    num_samples = num_longer = 0
    source = read_source(job.data.train, resolve=loaded.resolve_path, split=job.data.split or "train")
    try:
        for document in Reader(job.data, None).documents(source):
            length = lengths(document.text)
            if document.is_row and not job.packing:
                num_samples += 1
                num_longer += length > max_seq_len
            else:
                num_samples += -(-length // max_seq_len)
    except DataError:
        return None
    return num_samples, num_longer


def _length_function(loaded: LoadedJob) -> Callable[[str], int] | None:
    folder = model_folder(loaded.job.model, loaded.base_dir)
    if loaded.job.weights == "random" and not has_tokenizer(folder):
        return lambda text: len(text.encode("utf-8")) + 1
    file = folder / "tokenizer.json" if folder is not None else None
    if file is None or not file.exists():
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text).ids) + 1
