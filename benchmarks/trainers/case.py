"""The job that every trainer gets: model, tokenizer, weights and text, made from a seed."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from memplan.job.spec import Data, Job, Lora, Train
from memplan.train.output_folder import JOB_FILE, write_job

END, PADDING = "<eos>", "<pad>"


@dataclass(frozen=True)
class Size:
    """How large the job is; lengths are drawn between the shortest and `max_seq_len`."""

    hidden: int = 64
    layers: int = 4
    vocab_size: int = 32_000
    micro_batch_size: int = 4
    max_seq_len: int = 320
    shortest: int = 64
    steps: int = 20

    @property
    def num_samples(self) -> int:
        """As many as the steps take: no trainer begins a second pass, whose order would be its own."""
        return self.steps * self.micro_batch_size * ACCUMULATION


ACCUMULATION = 2
SEED = 0
MINIATURE = Size(hidden=32, layers=2, vocab_size=512, micro_batch_size=2, max_seq_len=24, shortest=8, steps=2)


def llama(size: Size) -> dict[str, Any]:
    """The model's config."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden,
        "intermediate_size": size.hidden * 11 // 4,
        "num_hidden_layers": size.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": size.max_seq_len,
        "tie_word_embeddings": False,
    }


def make_model(folder: Path, size: Size, dtype: str) -> None:
    """A folder with random weights and a tokenizer of one token for each word."""
    import tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(SEED)
    config = LlamaConfig(**llama(size))
    AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(folder)
    words = {f"w{number}": number for number in range(size.vocab_size - 2)}
    words |= {END: size.vocab_size - 2, PADDING: size.vocab_size - 1}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, PADDING))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=PADDING)
    fast.save_pretrained(folder)


def write_text(path: Path, size: Size) -> None:
    """Rows of random words of random lengths; the tokenizer adds the end."""
    chance = random.Random(SEED)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(size.num_samples):
            length = chance.randint(size.shortest, size.max_seq_len) - 1
            words = (f"w{chance.randrange(size.vocab_size - 2)}" for _ in range(length))
            file.write(json.dumps({"text": " ".join(words)}) + "\n")


def make_job(root: Path, method: str, size: Size, dtype: str) -> Job:
    """
    The job, with its model and text in `root`: clipping, weight decay and micro batches of unequal lengths, since
    trainers could differ in each.
    """
    make_model(root / "model", size, dtype)
    write_text(root / "train.jsonl", size)
    return Job(
        model=str(root / "model"),
        method=method,
        dtype=dtype,
        micro_batch_size=size.micro_batch_size,
        gradient_accumulation_steps=ACCUMULATION,
        max_seq_len=size.max_seq_len,
        lora=Lora(rank=8, alpha=16),
        data=Data(train=str(root / "train.jsonl")),
        train=Train(
            max_steps=size.steps,
            learning_rate=1e-3,
            weight_decay=0.01,
            max_grad_norm=1.0,
            save_every=size.steps,
            seed=SEED,
        ),
    )


def prepare(job: Job, folder: Path) -> None:
    """Write the job of one trainer into the folder that it works in."""
    folder.mkdir()
    write_job(folder / JOB_FILE, replace(job, train=replace(job.train, output_dir=str(folder))))
