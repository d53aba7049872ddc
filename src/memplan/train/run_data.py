"""What a run reads before its model: rows for new tokens, and the samples of its data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from memplan.job.spec import Job
from memplan.model import Architecture
from memplan.tape.vocabulary import resized_config
from memplan.train.documents import Reader
from memplan.train.report import data_line, data_summary
from memplan.train.samples import Samples, build_samples
from memplan.train.sources import read_source
from memplan.train.speech import say
from memplan.train.tokens import Tokenizer


def make_room(
    job: Job, config: dict[str, Any], tokenizer: Tokenizer, architecture: Architecture | None
) -> tuple[dict[str, Any], Architecture | None]:
    """The config and the architecture with rows for the tokens that were added; says how many."""
    names = job.data.special_tokens
    if not names:
        return config, architecture
    before = config.get("vocab_size")
    config = resized_config(job, config, tokenizer.size, tokenizer.num_new)
    rows = config["vocab_size"]
    if architecture is not None:
        architecture = replace(architecture, vocab_size=rows, is_resized=True)
    grown = f"embeddings grow from {before} to {rows}" if rows != before else "the embeddings have room"
    known = len(names) - tokenizer.num_new
    say(
        f"special tokens: {tokenizer.num_new} added"
        + (f", {known} known already" if known else "")
        + f"; {grown}"
    )
    return config, architecture


def read_samples(
    job: Job, folder: Path, tokenizer: Tokenizer, source: str, *, split: str
) -> tuple[Samples, dict[str, Any]]:
    """Samples of a split, whose files are kept in `folder`, and the summary of them that is said and recorded."""
    reader = Reader(job.data, tokenizer.render)
    rows = read_source(source, resolve=Path, split=job.data.split or split, subset=job.data.subset)
    samples = build_samples(
        reader.documents(rows),
        tokenizer.tokenize,
        max_seq_len=job.max_seq_len,
        packing=job.packing,
        folder=folder,
    )
    summary = data_summary(samples, reader.kinds, tokenizer.name)
    say(data_line("data" if split == "train" else "evaluation data", summary))
    return samples, summary
