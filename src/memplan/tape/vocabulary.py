"""
The embeddings of a job that adds tokens: how many rows they have when training begins.

Tokens take the ids behind those of the tokenizer. Many models have more embeddings than their tokenizer has tokens, and
then there is room; without it the embeddings, and the head with them, grow. They never shrink.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from memplan.errors import ModelError
from memplan.job.spec import Job
from memplan.model.architecture import Architecture


def num_embeddings(
    job: Job, vocab_size: int, tokenizer_size: int | None = None, num_new: int | None = None
) -> int:
    """
    Rows of the embeddings once the job's special tokens are added to a model of `vocab_size` rows.

    Args:
        tokenizer_size: tokens that the tokenizer has without them; None: as many as there are rows, the most there can
            be.
        num_new: of the job's special tokens, how many the tokenizer lacks; None: all.

    >>> job = Job(model="m").replace(**{"data.special_tokens": ("<a>", "<b>")})
    >>> num_embeddings(job, 32000), num_embeddings(job, 151936, 151665)
    (32002, 151936)
    >>> num_embeddings(job.replace(**{"data.vocab_multiple": 64}), 32000)
    32064
    """
    added = len(job.data.special_tokens) if num_new is None else num_new
    needed = (vocab_size if tokenizer_size is None else tokenizer_size) + added
    if not added or needed <= vocab_size:
        return vocab_size
    multiple = job.data.vocab_multiple
    return -(-needed // multiple) * multiple


def with_special_tokens(job: Job, architecture: Architecture) -> Architecture:
    """The architecture as the job trains it; it may be that already."""
    if not job.data.special_tokens or architecture.is_resized:
        return architecture
    rows = num_embeddings(job, architecture.vocab_size, architecture.tokenizer_size)
    return replace(architecture, vocab_size=rows, is_resized=True)


def resized_config(
    job: Job, config: dict[str, Any], tokenizer_size: int | None = None, num_new: int | None = None
) -> dict[str, Any]:
    """
    A `config.json` as the job trains it; arguments as in `num_embeddings`.

    Raises:
        ModelError: it does not say at the top how many embeddings there are.
    """
    if not job.data.special_tokens:
        return config
    before = config.get("vocab_size")
    if not isinstance(before, int):
        raise ModelError(
            "the model's config names no `vocab_size` of its own, so that no tokens can be added to it",
            hint="leave out `data.special_tokens`, or name the config of its text model",
        )
    return {**config, "vocab_size": num_embeddings(job, before, tokenizer_size, num_new)}
