"""What the model writes: prompts of the evaluation data, continued; for NPT by base and NPT model, side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from memplan.job.spec import Job
from memplan.train.data import MicroBatch
from memplan.train.parallel import Parallel
from memplan.train.samples import ID_BITS, MASKED, START, Samples


@dataclass(frozen=True)
class Continuation:
    """A prompt and what follows, as text."""

    prompt: str
    texts: dict[str, str]
    """By who writes: `model`; for NPT `base` and `npt`."""


def prompts(job: Job, samples: Samples) -> list[list[int]]:
    """
    Of each of the first `train.sample_prompts` samples, as ids: what no loss is taken on before the first completion,
    or else the first half of its first document; shorter where `train.sample_tokens` more would go beyond
    `max_seq_len`.
    """
    found = []
    for index in range(min(job.train.sample_prompts, len(samples))):
        row = samples[index]
        document = row[
            : next((place for place, token in enumerate(row) if place and token & START), len(row))
        ]
        masked = next((place for place, token in enumerate(document) if not token & MASKED), 0)
        length = min(masked or len(document) // 2, job.max_seq_len - job.train.sample_tokens)
        found.append([token & ID_BITS for token in document[: max(1, length)]])
    return found


@torch.no_grad()
def continuations(
    job: Job, parallel: Parallel, samples: Samples, decode: Callable[[list[int]], str]
) -> list[Continuation]:
    """
    Prompts continued by the likeliest token, `train.sample_tokens` times; all ranks call it.

    One sequence at a time, without dropout, and without a cache of keys and values: no forward pass takes more memory
    than one of the evaluation, which the plan has.
    """
    model = parallel.built.model
    was_training = model.training
    model.eval()
    try:
        return [
            Continuation(decode(prompt), _texts(job, parallel, prompt, decode))
            for prompt in prompts(job, samples)
        ]
    finally:
        parallel.settle()
        model.train(was_training)


def _texts(
    job: Job, parallel: Parallel, prompt: list[int], decode: Callable[[list[int]], str]
) -> dict[str, str]:
    count = job.train.sample_tokens
    if job.method != "npt":
        return {"model": decode(_continue(parallel, prompt, count))}
    from memplan.npt import set_mode

    texts = {}
    for mode in ("base", "npt"):
        set_mode(parallel.built.model, mode)
        texts[mode] = decode(_continue(parallel, prompt, count))
    return texts


def _continue(parallel: Parallel, prompt: list[int], count: int) -> list[int]:
    """The ids of what follows."""
    ids = torch.tensor([prompt], device=parallel.group.device)
    for _ in range(count):
        following = parallel.next_tokens(MicroBatch(ids, ids))
        ids = torch.cat([ids, following.unsqueeze(1)], dim=1)
    written: list[int] = ids[0, len(prompt) :].tolist()
    return written


def sample_lines(found: list[Continuation], step: int) -> list[str]:
    """For the log: the end of each prompt, and what follows, one line for each that writes."""
    lines = []
    for number, one in enumerate(found, start=1):
        lines.append(f"sample {number} of step {step}: ...{_one_line(one.prompt)[-60:]}")
        width = max(map(len, one.texts)) + 1
        lines += [f"  {who + ':':{width}} {_one_line(text)}" for who, text in one.texts.items()]
    return lines


def _one_line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
