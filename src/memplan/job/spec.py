"""
What a user wants to run: a `Job`, as frozen dataclasses whose fields are the fields of the job file.

A `Job` knows nothing of bytes, GPUs or torch. Derived values are properties. `setting(...)` keeps the
sentence that describes a field, its choices and its bounds next to the field; the reader's errors, the JSON
schema and the generated reference all come from there.
"""

# ruff: noqa: RUF009 (`setting` returns a dataclass field, not a shared default)

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from memplan.job.sections import (
    DTYPE_BYTES,
    STRATEGIES,
    AllocatorSettings,
    Data,
    Load,
    Lora,
    Npt,
    Offload,
    Parallel,
    Quantization,
    Train,
    setting,
)

__all__ = [
    "DTYPE_BYTES", "OPTIMIZERS", "STRATEGIES", "AllocatorSettings", "Data", "Job", "Load", "Lora", "Npt", "Offload",
    "Parallel", "Quantization", "Train",
]  # fmt: skip

OPTIMIZERS = (
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "ao_adamw_8bit", "ao_adamw_4bit", "ao_adamw_fp8",
    "adafactor", "sgd", "lion",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training job: the question that memplan answers."""

    model: str = setting(
        dataclasses.MISSING, "Hub id, local folder, config.json, or a name from `memplan models`"
    )
    weights: str = setting(
        "pretrained",
        "`random` initialises on the device: real memory, no download",
        choices=("pretrained", "random"),
    )
    method: str = setting("lora", "What is trained", choices=("full", "lora", "qlora", "npt"))
    dtype: str = setting("bfloat16", "dtype of the base weights in memory", choices=tuple(DTYPE_BYTES))
    autocast: str | None = setting(
        None, "dtype that autocast computes in; null: none", choices=(None, "bfloat16", "float16")
    )
    micro_batch_size: int = setting(1, "Sequences per device in one forward pass", minimum=1)
    gradient_accumulation_steps: int = setting(1, "Forward and backward passes per optimizer step", minimum=1)
    max_seq_len: int = setting(2048, "Longest sequence after truncation, in tokens", minimum=1)
    packing: bool = setting(False, "Concatenate samples into full sequences")
    padding_free: bool = setting(
        False,
        "The sequences of a micro batch are one row with their positions, kept apart: TRL's `padding_free` and its "
        "packing of whole documents, with `loop: hf_trainer`",
    )
    activation_checkpointing: str = setting(
        "none", "Recompute blocks in backward (gradient checkpointing)", choices=("none", "selective", "full")
    )
    use_reentrant: bool = setting(
        False,
        "torch's older checkpointing, in `loop: hf_trainer` and `script`: a block runs without a graph until backward",
    )
    activation_offload: bool = setting(False, "Keep checkpointed block inputs in host memory")
    attention: str = setting(
        "sdpa", "Attention implementation", choices=("eager", "sdpa", "flash_attention_2")
    )
    attention_kernel: str = setting(
        "auto",
        "torch's kernel behind `attention: sdpa`; `auto`: what torch picks on the GPU",
        choices=("auto", "flash", "efficient", "cudnn", "math"),
    )
    loss: str = setting(
        "auto",
        "`full` holds all logits; `chunked` computes head and loss in chunks, in `loop: hf_trainer` as TRL's "
        "SFTTrainer; `fused` is Liger's kernel; `auto` is "
        "`chunked` in our own loop where the head is frozen, else `full`",
        choices=("auto", "full", "chunked", "fused"),
    )
    kernels: str = setting(
        "torch",
        "Norms, rotary positions and gated MLPs as transformers computes them, or `liger`: Liger's kernels, which "
        "`use_liger_kernel` of the Trainer puts in their place",
        choices=("torch", "liger"),
    )
    optimizer: str = setting("adamw", "Optimizer", choices=OPTIMIZERS)
    optimizer_kernel: str = setting(
        "fused", "Implementation of the step", choices=("foreach", "fused", "loop")
    )
    lora: Lora = setting(Lora, "Adapters, for `method: lora` and `qlora`")
    npt: Npt = setting(Npt, "NPT layers, for `method: npt`")
    quantization: Quantization = setting(Quantization, "4-bit or 8-bit base, for `method: qlora`")
    parallel: Parallel = setting(Parallel, "Distribution over GPUs")
    offload: Offload = setting(Offload, "Host memory as an extension of the GPU's")
    load: Load = setting(Load, "Loading of the weights")
    data: Data = setting(Data, "Training and evaluation data")
    train: Train = setting(Train, "The run")
    loop: str = setting(
        "memplan",
        "Whose training loop runs: `memplan` frees the logits before backward, `hf_trainer` is transformers' "
        "Trainer, `script` holds the model's output through backward",
        choices=("memplan", "hf_trainer", "script"),
    )
    gpu: str | None = setting(None, "Capacity asked about: `24GB`, `24GiB`, a GPU's name, `live`, or null")
    allocator: AllocatorSettings = setting(AllocatorSettings, "The CUDA caching allocator")
    margin: str | None = setting(
        None, "Extra room to keep: `5%` or `1GiB`; null: the engine's own error band"
    )

    @property
    def has_quantized_base(self) -> bool:
        """Whether the linear layers of the base are stored in 4 or 8 bits."""
        return self.method == "qlora" or (self.method == "npt" and self.npt.quantized_base)

    @property
    def has_gptq_base(self) -> bool:
        """Whether they are stored as GPTQ packs them."""
        return self.has_quantized_base and self.quantization.type == "gptq"

    @property
    def has_8bit_base(self) -> bool:
        """Whether they are stored in 8 bits, as LLM.int8() does it."""
        return self.has_quantized_base and self.quantization.type == "int8"

    @property
    def has_float16_adapters(self) -> bool:
        """Whether what trains is float16."""
        return self.method in ("lora", "qlora") and self.lora.dtype == "float16"

    def loss_form(self, *, plain_head: bool = True) -> str:
        """
        `loss` with `auto` decided. A frozen head has no gradient that would be rounded chunk by chunk, so the chunked
        loss is as exact as the full one there.

        Args:
            plain_head: whether the head is one linear layer without bias or adapter, not quantised.
        """
        if self.loss != "auto":
            return self.loss
        is_ours = self.loop == "memplan" and self.method in ("lora", "qlora")
        return "chunked" if is_ours and plain_head else "full"

    @property
    def trained_tokens(self) -> int:
        """Rows of frozen embeddings that train beside adapters: one for each special token."""
        trains = self.method in ("lora", "qlora") and self.lora.train_tokens
        return len(self.data.special_tokens) if trains and not self.modules_to_save else 0

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """`lora.modules_to_save`, where there are adapters."""
        return self.lora.modules_to_save if self.method in ("lora", "qlora") else ()

    @property
    def saved_dtype(self) -> str:
        """
        dtype of the copies of `lora.modules_to_save` when peft has made them: after it has prepared a quantised model.
        """
        is_prepared = self.method == "qlora" and self.quantization.kbit_preparation
        return self.lora.modules_to_save_dtype or ("float32" if is_prepared else self.dtype)

    @property
    def world_size(self) -> int:
        """Number of GPUs of the whole job."""
        parallel = self.parallel
        return (
            parallel.dp_shard * parallel.dp_replicate * parallel.tp * parallel.pp * parallel.cp * parallel.ep
        )

    @property
    def global_batch_size(self) -> int:
        """Sequences that one optimizer step sees, over all ranks."""
        data_parallel = self.parallel.dp_shard * self.parallel.dp_replicate
        return self.micro_batch_size * self.gradient_accumulation_steps * data_parallel

    def replace(self, **changes: Any) -> Job:
        """
        A copy with fields changed; nested fields by dotted path.

        >>> Job(model="gpt2").replace(**{"lora.rank": 8, "micro_batch_size": 2}).lora.rank
        8
        """
        nested: dict[str, dict[str, Any]] = {}
        flat: dict[str, Any] = {}
        for path, value in changes.items():
            head, _, rest = path.partition(".")
            if rest:
                nested.setdefault(head, {})[rest] = value
            else:
                flat[head] = value
        for head, inner in nested.items():
            flat[head] = dataclasses.replace(getattr(self, head), **inner)
        return dataclasses.replace(self, **flat)
