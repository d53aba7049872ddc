"""What base and NPT model write, side by side: prompts of the evaluation data, continued."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from memplan.job.spec import Job
from memplan.npt import set_mode
from memplan.train.data import MicroBatch
from memplan.train.parallel import Parallel
from memplan.train.samples import ID_BITS, Samples

MODES: tuple[Literal["base", "npt"], ...] = ("base", "npt")


@dataclass(frozen=True)
class Continuation:
    """A prompt and what both models make of it, as text."""

    prompt: str
    base: str
    npt: str


def prompts(job: Job, samples: Samples) -> list[list[int]]:
    """
    The first half of each of the first `npt.samples` samples, as ids; shorter where `npt.sample_tokens` more would go
    beyond `max_seq_len`.
    """
    found = []
    for index in range(min(job.npt.samples, len(samples))):
        ids = [token & ID_BITS for token in samples[index]]
        length = min(len(ids) // 2, job.max_seq_len - job.npt.sample_tokens)
        found.append(ids[: max(1, length)])
    return found


@torch.no_grad()
def continuations(
    job: Job, parallel: Parallel, samples: Samples, decode: Callable[[list[int]], str]
) -> list[Continuation]:
    """
    Prompts continued by the likeliest token, `npt.sample_tokens` times, by base and NPT model; all ranks call it.

    One sequence at a time and without a cache of keys and values: no forward pass takes more memory than one of the
    evaluation, which the plan has.
    """
    found = []
    for prompt in prompts(job, samples):
        texts = []
        for mode in MODES:
            set_mode(parallel.built.model, mode)
            texts.append(decode(_continue(parallel, prompt, job.npt.sample_tokens)))
        found.append(Continuation(decode(prompt), *texts))
    parallel.settle()
    return found


def _continue(parallel: Parallel, prompt: list[int], count: int) -> list[int]:
    """The ids of what follows."""
    ids = torch.tensor([prompt], device=parallel.group.device)
    for _ in range(count):
        following = parallel.next_tokens(MicroBatch(ids, ids))
        ids = torch.cat([ids, following.unsqueeze(1)], dim=1)
    written: list[int] = ids[0, len(prompt) :].tolist()
    return written


def sample_lines(found: list[Continuation], step: int) -> list[str]:
    """For the log: the end of each prompt, and both continuations, one line each."""
    lines = []
    for number, one in enumerate(found, start=1):
        lines.append(f"sample {number} of step {step}: ...{_one_line(one.prompt)[-60:]}")
        lines.append(f"  base: {_one_line(one.base)}")
        lines.append(f"  npt:  {_one_line(one.npt)}")
    return lines


def _one_line(text: str) -> str:
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())
