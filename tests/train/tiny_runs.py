"""Runs small enough for a test: a few thousand weights, a few lines of text, a handful of steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memplan.job.spec import Job, Lora, Npt
from memplan.train.output_folder import JOB_FILE, write_job
from memplan.train.record import read_metrics_lines

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 80,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "initializer_range": 0.1,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "n_embd": 32, "n_layer": 3, "n_head": 4,
    "vocab_size": 260, "n_positions": 64, "activation_function": "gelu_new", "initializer_range": 0.1,
}  # fmt: skip
FALCON = {
    "architectures": ["FalconForCausalLM"], "model_type": "falcon", "hidden_size": 32, "num_hidden_layers": 3,
    "num_attention_heads": 4, "vocab_size": 260, "max_position_embeddings": 64, "initializer_range": 0.1,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip

SENTENCES = (
    "The peak is the largest moment, never the sum.",
    "Live tensors are allocated.",
    "Segments are reserved.",
    "Need is what a card must have.",
    "Weights, gradients, optimizer states and activations.",
    "Logits are the largest thing for large vocabularies.",
    "Short.",
    "A chunk at a time.",
)


def model_folder(root: Path, config: dict[str, Any] = LLAMA) -> Path:
    """A folder that names a model and holds no weights."""
    folder = root / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tiny_job(root: Path, method: str = "lora", *, config: dict[str, Any] = LLAMA, **changes: Any) -> Job:
    """A job on the tiny model in `root`/run; changes as in `Job.replace`, with `__` for the dot."""
    data = root / "train.jsonl"
    data.write_text("".join(json.dumps({"text": sentence}) + "\n" for sentence in SENTENCES))
    job = Job(
        model=str(model_folder(root, config)),
        weights="random",
        method=method,
        dtype="float32",
        micro_batch_size=2,
        gradient_accumulation_steps=2,
        max_seq_len=48,
        lora=Lora(rank=4, alpha=8),
        npt=Npt(layers="all", rank=4),
    ).replace(
        **{
            "data.train": str(data),
            "train.output_dir": str(root / "run"),
            "train.max_steps": 4,
            "train.save_every": 100,
            "train.learning_rate": 1e-2,
        }
    )
    return job.replace(**{name.replace("__", "."): value for name, value in changes.items()})


def prepared(job: Job) -> Path:
    """The output folder of a job as `launch` prepares it for the worker."""
    folder = Path(job.train.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write_job(folder / JOB_FILE, job)
    return folder


def stops_in(phase: str, step: int) -> Callable[[str, int], None]:
    """A hook of `run_job` that ends the run there."""

    def stop(reached: str, number: int) -> None:
        if (reached, number) == (phase, step):
            raise RuntimeError("pulled the plug")

    return stop


def losses(folder: Path) -> dict[int, float]:
    """Loss by step, exactly as computed."""
    return {line["step"]: line["loss"] for line in read_metrics_lines(folder)}


def tokenizer_folder(root: Path, chat_template: str | None = None) -> Path:
    """The tiny model's folder with a tokenizer of one token per character below 256, and `<eos>`."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = {chr(code): code for code in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet | {"<eos>": 256}, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = chat_template
    folder = model_folder(root)
    fast.save_pretrained(folder)
    return folder
