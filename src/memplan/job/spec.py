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

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element of each dtype that a job may name."""

STRATEGIES = (
    "NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD", "ZERO_1", "ZERO_2", "ZERO_3",
)  # fmt: skip
OPTIMIZERS = (
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "sgd", "lion",
)  # fmt: skip


def setting(
    default: Any,
    doc: str,
    *,
    choices: tuple[Any, ...] | None = None,
    minimum: float | None = None,
    exclusive: bool = False,
    below: float | None = None,
) -> Any:
    """
    A dataclass field with its one-sentence description, its choices, its lower bound (`exclusive`: it must
    lie above that) and its upper one (it must lie `below` that).

    Where a field takes a word or a list, the choices are the words.
    """
    metadata = {"doc": doc, "choices": choices, "minimum": minimum, "exclusive": exclusive, "below": below}
    if isinstance(default, type):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if default is dataclasses.MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adapters beside frozen linear layers (`method: lora` and `qlora`)."""

    rank: int = setting(16, "Inner dimension of each adapter", minimum=1)
    alpha: float = setting(
        32, "Scale: the adapter's output is multiplied by alpha / rank", minimum=0, exclusive=True
    )
    dropout: float = setting(0.0, "Dropout on the adapter's input, in [0, 1)", minimum=0, below=1)
    target_modules: str | tuple[str, ...] = setting(
        "all-linear",
        "Names of the linear layers that get an adapter, or `all-linear` (all but the head)",
        choices=("all-linear",),
    )
    dtype: str = setting("float32", "dtype of the adapters in memory", choices=tuple(DTYPE_BYTES))


@dataclass(frozen=True, kw_only=True)
class Npt:
    """Neuro-Plastic Transformer layers trained to equal the blocks they replace (`method: npt`)."""

    layers: str | tuple[int, ...] = setting(
        "upper_half",
        "Blocks to convert: `all`, `upper_half`, `lower_half`, or a list of indices",
        choices=("all", "upper_half", "lower_half"),
    )
    rank: int = setting(16, "Inner dimension of the weight delta", minimum=1)
    modulation_scale: float = setting(0.1, "Factor on tanh(attention @ A)", minimum=0, exclusive=True)
    form: str = setting(
        "factored",
        "`factored` never builds the weight delta; `materialised` builds it for every token",
        choices=("factored", "materialised"),
    )
    regularization: float = setting(
        0.01, "Weight of the mean squared Frobenius norm of the deltas", minimum=0
    )


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """4-bit storage of the frozen base (`method: qlora`)."""

    type: str = setting("nf4", "4-bit data type", choices=("nf4", "fp4"))
    double_quant: bool = setting(True, "Quantise the quantisation constants too")
    kbit_preparation: bool = setting(
        False, "peft's prepare_model_for_kbit_training: every parameter that is not 4-bit becomes float32"
    )
    skip: tuple[str, ...] = setting(("lm_head",), "Linear layers that stay in `dtype`")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the job is spread over GPUs. Degrees multiply to the number of GPUs."""

    strategy: str = setting("NO_SHARD", "NO_SHARD is one GPU or DDP", choices=STRATEGIES)
    dp_shard: int = setting(1, "Ranks that one copy of the model is sharded over", minimum=1)
    dp_replicate: int = setting(1, "Copies of the model that each see other data", minimum=1)
    tp: int = setting(1, "Tensor parallel degree (planned for later; must be 1)", minimum=1)
    pp: int = setting(1, "Pipeline parallel degree (planned for later; must be 1)", minimum=1)
    cp: int = setting(1, "Context parallel degree (planned for later; must be 1)", minimum=1)
    ep: int = setting(1, "Expert parallel degree (planned for later; must be 1)", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Offload:
    """What lives in host memory between its uses."""

    params: bool = setting(False, "Sharded parameters, gradients and optimizer step on the host")
    optimizer: bool = setting(False, "Optimizer states and step on the host")


@dataclass(frozen=True, kw_only=True)
class Load:
    """How the weights get onto the device."""

    ram_efficient: bool = setting(
        True, "Stream the weights shard by shard instead of building the model in RAM"
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """What to train on. Paths are relative to the job file."""

    train: str | None = setting(
        None, "JSONL, text or Markdown file, folder of them, `datasets` folder, or `memplan-docs`"
    )
    eval: str | None = setting(None, "As `train`, for evaluation")
    text: str = setting("text", "Column of a JSONL or `datasets` source that holds the text")


@dataclass(frozen=True, kw_only=True)
class Train:
    """The training run itself."""

    max_steps: int = setting(100, "Optimizer steps", minimum=1)
    learning_rate: float = setting(1e-4, "Peak learning rate", minimum=0, exclusive=True)
    warmup_steps: int = setting(0, "Steps of linear warm-up", minimum=0)
    schedule: str = setting(
        "constant", "Learning rate after the warm-up", choices=("constant", "linear", "cosine")
    )
    weight_decay: float = setting(0.0, "Decoupled weight decay", minimum=0)
    max_grad_norm: float | None = setting(
        None, "Clip the gradient norm to this; null: no clipping", minimum=0, exclusive=True
    )
    save_every: int = setting(50, "Steps between checkpoints", minimum=1)
    output_dir: str = setting(
        "runs/memplan", "Folder for the record, metrics, checkpoints and the final weights"
    )
    seed: int = setting(0, "Seed of initialisation, data order and dropout", minimum=0)


@dataclass(frozen=True, kw_only=True)
class AllocatorSettings:
    """PyTorch's CUDA caching allocator, as set through its environment variable."""

    expandable_segments: bool = setting(True, "Grow segments in place instead of allocating new ones")
    max_split_size_mb: int | None = setting(
        None, "Blocks above this are never split (at least 20)", minimum=20
    )
    garbage_collection_threshold: float | None = setting(
        None, "Free old cached blocks above this fraction", minimum=0, exclusive=True, below=1
    )
    roundup_power2_divisions: int | None = setting(
        None, "Round requests up to a power of two over this", minimum=1
    )


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
    activation_checkpointing: str = setting(
        "none", "Recompute blocks in backward (gradient checkpointing)", choices=("none", "selective", "full")
    )
    activation_offload: bool = setting(False, "Keep checkpointed block inputs in host memory")
    attention: str = setting(
        "sdpa", "Attention implementation", choices=("eager", "sdpa", "flash_attention_2")
    )
    loss: str = setting(
        "full",
        "`full` holds all logits; `chunked` computes head and loss in chunks; `fused` is Liger's kernel",
        choices=("full", "chunked", "fused"),
    )
    optimizer: str = setting("adamw", "Optimizer", choices=OPTIMIZERS)
    optimizer_kernel: str = setting(
        "fused", "Implementation of the step", choices=("foreach", "fused", "loop")
    )
    lora: Lora = setting(Lora, "Adapters, for `method: lora` and `qlora`")
    npt: Npt = setting(Npt, "NPT layers, for `method: npt`")
    quantization: Quantization = setting(Quantization, "4-bit base, for `method: qlora`")
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
