"""
The sections of a job, and how a field is described: its sentence, its choices and its bounds, next to the field.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import ceil
from typing import Any

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Bytes of one element of each dtype that a job may name."""

STRATEGIES = (
    "NO_SHARD", "SHARD_GRAD_OP", "FULL_SHARD", "HYBRID_SHARD", "ZERO_1", "ZERO_2", "ZERO_3",
)  # fmt: skip


def setting(
    default: Any,
    doc: str,
    *,
    choices: tuple[Any, ...] | None = None,
    minimum: float | None = None,
    exclusive: bool = False,
    below: float | None = None,
    patterns: bool = False,
) -> Any:
    """
    A dataclass field with its one-sentence description, its choices, its lower bound (`exclusive`: it must
    lie above that) and its upper one (it must lie `below` that); and whether it may be a pattern of Python's `re`.

    Where a field takes a word or a list, the choices are the words.
    """
    metadata = {
        "doc": doc, "choices": choices, "minimum": minimum, "exclusive": exclusive, "below": below,
        "patterns": patterns,
    }  # fmt: skip
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
        "Names of the linear layers that get an adapter, a pattern that their full names match, or `all-linear` (all "
        "but the head)",
        choices=("all-linear",),
        patterns=True,
    )
    dtype: str = setting("float32", "dtype of the adapters in memory", choices=tuple(DTYPE_BYTES))
    train_tokens: bool = setting(
        True,
        "Train the rows of `data.special_tokens` in the embeddings, and in a head of its own weight; `modules_to_save` "
        "trains all rows in their place",
    )
    modules_to_save: tuple[str, ...] = setting(
        (),
        "Names of the input embeddings and of the head, of which peft trains whole copies beside the adapters, as "
        "`[embed_tokens, lm_head]`",
    )
    modules_to_save_dtype: str | None = setting(
        None,
        "dtype of these copies; null: that of what they copy, as peft leaves them",
        choices=(None, *DTYPE_BYTES),
    )


@dataclass(frozen=True, kw_only=True)
class Npt:
    """Neuro-Plastic Transformer layers trained to equal the blocks they replace (`method: npt`)."""

    layers: str | tuple[int, ...] = setting(
        "upper_half",
        "Blocks to convert: `all`, `upper_half`, `lower_half`, or a list of indices",
        choices=("all", "upper_half", "lower_half"),
    )
    variant: str = setting(
        "diag",
        "Weight delta of a token: `diag` is A diag(scale tanh(a A)) B, `linear` A diag(a C) B, `outer` a sum of outer "
        "products",
        choices=("diag", "linear", "outer"),
    )
    target: str = setting(
        "gate",
        "Matrices that get a delta: `gate` is the MLP's first one, `gate_up` also up_proj of a gated MLP, `all` the "
        "last one too (not with `diag`)",
        choices=("gate", "gate_up", "all"),
    )
    bias: bool = setting(False, "A delta of the bias beside that of the weight")
    rank: int = setting(16, "Inner dimension of the weight delta, of each component for `outer`", minimum=1)
    components: int = setting(1, "Outer products that are summed, for `npt.variant: outer`", minimum=1)
    modulation_scale: float = setting(
        0.1, "Factor on tanh(attention @ A), for `npt.variant: diag`", minimum=0, exclusive=True
    )
    initialization: str = setting(
        "zero",
        "`zero` starts with no delta and full-size gradients; `small` draws small random values throughout",
        choices=("zero", "small"),
    )
    form: str = setting(
        "factored",
        "`factored` never builds the weight delta; `materialised` builds it for every token",
        choices=("factored", "materialised"),
    )
    objective: str = setting(
        "layer",
        "`layer`: each block equals the one it replaces; `end_to_end`: the last hidden states equal the base's",
        choices=("layer", "end_to_end"),
    )
    stream: str = setting(
        "teacher",
        "Whose output the next block sees while blocks train: that of the original (`teacher`), of the NPT block "
        "(`student`), or first the one and more and more often the other (`curriculum`)",
        choices=("teacher", "student", "curriculum"),
    )
    curriculum_steps: int | None = setting(
        None,
        "Steps after which a `curriculum` has come to the student's stream; null: half of `train.max_steps`",
        minimum=2,
    )
    logits_weight: float = setting(
        0.0,
        "For `npt.objective: end_to_end`: share of the divergence of predictions in the loss, from 0 to 1; the rest is "
        "that of last hidden states",
        minimum=0,
    )
    temperature: float = setting(
        1.0, "Temperature of the predictions that `npt.logits_weight` compares", minimum=0, exclusive=True
    )
    quantized_base: bool = setting(False, "Store the frozen base in 4 bits, as `quantization` says")
    regularization: float = setting(
        0.01, "Weight of the mean squared Frobenius norm of the deltas in the loss", minimum=0
    )


STORAGES = ("uint8", "bfloat16", "float16", "float32")
"""bitsandbytes' default, and what FSDP shards."""


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """How bitsandbytes stores the frozen base (`method: qlora`)."""

    type: str = setting(
        "nf4",
        "Data type: `nf4` and `fp4` have 4 bits; `int8` is LLM.int8(), `load_in_8bit` of transformers; `gptq` is a "
        "checkpoint in 4 bits of GPTQ",
        choices=("nf4", "fp4", "int8", "gptq"),
    )
    group_size: int | None = setting(
        128, "Inputs that share a scale, for `quantization.type: gptq`; null: all of a layer", minimum=1
    )
    double_quant: bool = setting(True, "Quantise the quantisation constants of 4 bits too")
    storage: str = setting(
        "uint8",
        "dtype of the tensors that hold 4-bit weights; with `loop: hf_trainer` FSDP shards numbers, and no bytes",
        choices=STORAGES,
    )
    kbit_preparation: bool = setting(
        False, "peft's prepare_model_for_kbit_training: every parameter that is not quantised becomes float32"
    )
    skip: tuple[str, ...] = setting(("lm_head",), "Linear layers that stay in `dtype`")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """How the job is spread over GPUs. Degrees multiply to the number of GPUs."""

    strategy: str = setting("NO_SHARD", "NO_SHARD is one GPU or DDP", choices=STRATEGIES)
    dp_shard: int = setting(1, "Ranks that one copy of the model is sharded over", minimum=1)
    dp_replicate: int = setting(1, "Copies of the model that each see other data", minimum=1)
    fsdp_version: int = setting(
        2, "Which FSDP of torch shards with `loop: hf_trainer`; memplan's own loop has FSDP2", choices=(1, 2)
    )
    backward_prefetch: str = setting(
        "BACKWARD_PRE",
        "When FSDP1 gathers the next unit of backward: as the current one begins, as it ends, or when it is there",
        choices=("BACKWARD_PRE", "BACKWARD_POST", "NO_PREFETCH"),
    )
    tp: int = setting(1, "Tensor parallel degree (planned for later; must be 1)", minimum=1)
    pp: int = setting(1, "Pipeline parallel degree (planned for later; must be 1)", minimum=1)
    cp: int = setting(1, "Context parallel degree (planned for later; must be 1)", minimum=1)
    ep: int = setting(1, "Expert parallel degree (planned for later; must be 1)", minimum=1)


@dataclass(frozen=True, kw_only=True)
class Offload:
    """What lives in host memory between its uses."""

    params: bool = setting(False, "Sharded parameters, gradients and optimizer step on the host")
    optimizer: bool = setting(False, "Optimizer states and step on the host")
    activations: str = setting(
        "none",
        "All that backward needs, as TRL's `activation_offloading` moves it: beside the step (`streams`), or waited "
        "for (`synchronous`, axolotl's `legacy`). Traced, with `loop: hf_trainer`",
        choices=("none", "streams", "synchronous"),
    )


@dataclass(frozen=True, kw_only=True)
class Load:
    """How the weights get onto the device."""

    ram_efficient: bool = setting(
        True,
        "In memplan's own loop: stream the weights tensor by tensor instead of building the model in RAM. Trainers of "
        "transformers 5 map the files whatever it says",
    )


@dataclass(frozen=True, kw_only=True)
class Data:
    """What to train on. Paths are relative to the job file."""

    train: str | None = setting(
        None,
        "JSONL, JSON, CSV, Parquet, text or Markdown file, folder of them, `datasets` folder, hub id, or "
        "`memplan-docs`",
    )
    eval: str | None = setting(None, "As `train`, for evaluation")
    split: str | None = setting(
        None, "Split of a source that has several; null: `train`, and `validation` of `eval`"
    )
    subset: str | None = setting(None, "Configuration of a hub dataset that has several")
    format: str = setting(
        "auto",
        "What a row is; `auto` goes by its columns: messages before prompt and completion before text",
        choices=("auto", "text", "prompt", "chat"),
    )
    text: str = setting("text", "Column of the text")
    prompt: str = setting("prompt", "Column of the prompt, which the completion follows as it is")
    completion: str = setting("completion", "Column of the completion")
    messages: str = setting("messages", "Column of a conversation (`conversations` is known too)")
    chat_template: str | None = setting(
        None, "Jinja file that writes conversations out; null: the tokenizer's own template"
    )
    mask: str = setting(
        "prompt",
        "No loss on `prompt`s and on all that is not the assistant's; `history`: nor on its earlier turns",
        choices=("none", "prompt", "history"),
    )
    special_tokens: tuple[str, ...] = setting(
        (), "Tokens to add to the tokenizer; embeddings and head grow where they have no row for them"
    )
    vocab_multiple: int = setting(
        1, "Embeddings that grow for `special_tokens` grow to a multiple of this", minimum=1
    )
    longest_first: bool = setting(
        True, "Put the two longest samples into steps 1 and 2, so that a run that cannot fit fails at once"
    )


@dataclass(frozen=True, kw_only=True)
class Train:
    """The training run itself."""

    max_steps: int = setting(100, "Optimizer steps", minimum=1)
    epochs: float | None = setting(
        None,
        "Passes over the data, in place of `max_steps`; the last step is filled up",
        minimum=0,
        exclusive=True,
    )
    learning_rate: float = setting(1e-4, "Peak learning rate", minimum=0, exclusive=True)
    warmup_steps: int = setting(0, "Steps of linear warm-up", minimum=0)
    warmup_ratio: float | None = setting(
        None, "Share of `max_steps` that warms up, in place of `warmup_steps`", minimum=0, below=1
    )
    schedule: str = setting(
        "constant", "Learning rate after the warm-up", choices=("constant", "linear", "cosine")
    )
    min_learning_rate: float = setting(
        0.0, "Where `linear` and `cosine` end, just after the last step", minimum=0
    )
    weight_decay: float = setting(
        0.0, "Decoupled weight decay of matrices; vectors (biases, norms) get none", minimum=0
    )
    beta1: float = setting(0.9, "First moment's decay, of AdamW and Lion", minimum=0, below=1)
    beta2: float = setting(0.999, "Second moment's decay, of AdamW and Lion", minimum=0, below=1)
    epsilon: float = setting(1e-8, "Added to AdamW's denominator", minimum=0, exclusive=True)
    max_grad_norm: float | None = setting(
        None, "Clip the gradient norm to this; null: no clipping", minimum=0, exclusive=True
    )
    save_every: int = setting(50, "Steps between checkpoints", minimum=1)
    keep_checkpoints: int = setting(3, "Newest checkpoints that are kept", minimum=1)
    eval_every: int | None = setting(
        None, "Steps between evaluations on `data.eval`; null: whenever a checkpoint is saved", minimum=1
    )
    keep_best: bool = setting(
        True, "Save the step with the lowest evaluation loss too, and keep it beside the newest"
    )
    early_stopping: int | None = setting(
        None, "Stop after this many evaluations without a new lowest loss; null: never", minimum=1
    )
    sample_prompts: int = setting(
        0, "Prompts of `data.eval` that the model continues in the log, at every evaluation", minimum=0
    )
    sample_tokens: int = setting(32, "Tokens that each of them is continued by", minimum=1)
    output_dir: str = setting(
        "runs/memplan", "Folder for the record, metrics, checkpoints and the final weights"
    )
    report_to: str = setting(
        "none", "Where the metrics of each step go as well", choices=("none", "tensorboard", "wandb")
    )
    seed: int = setting(0, "Seed of initialisation, data order and dropout", minimum=0)

    @property
    def num_warmup_steps(self) -> int:
        """Optimizer steps of linear warm-up, given as such or as a share of all."""
        if self.warmup_ratio is None:
            return self.warmup_steps
        return ceil(self.warmup_ratio * self.max_steps)


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
