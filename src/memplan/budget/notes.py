"""What a person should know of a plan because of the model's architecture; the warnings of a result."""

from __future__ import annotations

from math import prod

from memplan.job.problems import listed
from memplan.job.spec import DTYPE_BYTES, Job
from memplan.model.architecture import Architecture
from memplan.model.families import layout
from memplan.tape.backends import Target
from memplan.tape.behaviour import Behaviour
from memplan.tape.liger import FAMILIES as LIGER_FAMILIES
from memplan.tape.low_bit import LOW_BIT
from memplan.tape.sharded.zero_groups import (
    DEEPSPEED,
    persistence_threshold,
    prefetch_elements,
    reduce_bucket_elements,
    zero_stage,
)
from memplan.tape.software import compute_capability
from memplan.tape.targets import targets_stack, unused_names
from memplan.tape.vocabulary import num_embeddings
from memplan.units import format_bytes


def attention_notes(job: Job, target: Target) -> tuple[str, ...]:
    """Which kernel torch's attention ran in, whoever wrote the tape, and why."""
    return target.notes(is_known=compute_capability(job.gpu) is not None)


def zero_notes(job: Job, architecture: Architecture) -> tuple[str, ...]:
    """What is assumed of DeepSpeed's configuration, which a job file does not hold."""
    stage = zero_stage(job)
    if not stage:
        return ()
    hidden_size = architecture.hidden_size
    elements = reduce_bucket_elements(hidden_size)
    if stage == 3:
        return (
            f"ZeRO stage 3: read from the source of DeepSpeed {DEEPSPEED} and not measured; assumed are the values "
            f"that transformers gives to `auto`, `reduce_bucket_size` {elements:,}, `stage3_prefetch_bucket_size` "
            f"{prefetch_elements(hidden_size):,} and `stage3_param_persistence_threshold` "
            f"{persistence_threshold(hidden_size):,} elements, and DeepSpeed's defaults of everything else, such as "
            "`overlap_comm: true`, whose two streams keep freed memory a little longer than the plan does",
        )
    return (
        f"ZeRO stage {stage}: read from the source of DeepSpeed {DEEPSPEED} and not measured; assumed are "
        f"`reduce_bucket_size: auto`, which transformers makes {elements:,} elements, and DeepSpeed's defaults of "
        "everything else, such as `overlap_comm: false`",
    )


def accelerate_notes(job: Job, behaviour: Behaviour) -> tuple[str, ...]:
    """What FSDP does otherwise where accelerate sets it up."""
    if not (behaviour.accelerate_fsdp2 or behaviour.fsdp1):
        return ()
    notes = []
    if behaviour.accelerate_fsdp2 and job.has_quantized_base and job.quantization.storage == "uint8":
        notes.append(
            "accelerate leaves 4-bit weights stored as bytes out of what FSDP2 shards: the packed base is whole on "
            f"every rank; `quantization.storage: {job.autocast or job.dtype}` (`bnb_4bit_quant_storage` of "
            "BitsAndBytesConfig) shards it"
        )
    if job.gradient_accumulation_steps > 1:
        notes.append(
            "accelerate reduces gradients after the last micro batch of a step: until then those of all that trains "
            "are whole on every rank; `gradient_accumulation_steps: 1`, or `loop: memplan`, reduces each"
        )
    return tuple(notes)


def quantization_notes(job: Job, behaviour: Behaviour) -> tuple[str, ...]:
    """What an 8-bit base takes that a plan cannot know, or that nobody expects."""
    if not job.has_8bit_base:
        return ()
    tokens = job.micro_batch_size * job.max_seq_len
    column_bytes = tokens * DTYPE_BYTES[job.autocast or job.dtype]
    notes = [
        "`quantization.type: int8` is planned without outliers, which only the data has: every column of a layer's "
        f"input with a value from 6.0 on is kept besides, {format_bytes(column_bytes)} per layer until backward"
    ]
    if job.activation_checkpointing != "none" and not behaviour.reentrant:
        notes.append(
            "bitsandbytes keeps the input of an 8-bit layer where checkpointing does not see it: until backward has "
            "ended, those of all layers are held, recomputed or not"
            + ("" if job.loop == "memplan" else "; `use_reentrant: true` holds none")
        )
    return tuple(notes)


def optimizer_notes(job: Job) -> tuple[str, ...]:
    """What a compiled step takes that is known of one version of torch, or in no plan."""
    if job.optimizer not in LOW_BIT:
        return ()
    return (
        f"`{job.optimizer}` compiles its step: the buffers in it are those that torch 2.13 writes; the first step also "
        "times kernels, with a buffer as large as the GPU's L2 cache, which is not planned",
    )


def architecture_notes(job: Job, architecture: Architecture) -> tuple[str, ...]:
    """Sentences; empty for most decoders."""
    notes = []
    if job.has_gptq_base:
        notes.append(
            "weights in GPTQ's format: planned as gptqmodel 7.3 trains (`backend: auto_trainable`), read from its "
            "source and not measured: a weight is dequantised by one kernel, which torch.compile makes, and kept in "
            "float16 until backward"
        )
    if job.data.special_tokens and architecture.tokenizer_size is None and not architecture.is_resized:
        rows = num_embeddings(job, architecture.vocab_size)
        notes.append(
            f"`data.special_tokens`: planned with {rows} embeddings, as if the tokenizer filled the "
            f"{architecture.vocab_size} there are; where it does not, they may have room already"
        )
    if (
        architecture.family == "falcon"
        and architecture.num_key_value_heads < architecture.num_attention_heads
        and not architecture.grouped_projection
        and job.attention == "sdpa"
    ):
        notes.append(
            "transformers gives sdpa one key head for all query heads here, which only torch's composite kernel takes: "
            "it holds scores in float32; `attention: flash_attention_2` does not"
        )
    if job.kernels == "liger" and architecture.family not in LIGER_FAMILIES:
        notes.append(
            f"`kernels: liger` is planned for {', '.join(LIGER_FAMILIES)}, and here as transformers' own operations, "
            "which hold more"
        )
    unused = unused_names(job, architecture)
    if unused:
        notes.append(
            f"`lora.target_modules`: no layer is called {listed(unused, 'or')}, which peft passes over"
        )
    if not architecture.num_experts:
        return tuple(notes)
    notes += [
        "experts: planned for `grouped_mm`, transformers 5's default, which sorts the tokens of all experts into one "
        "tensor: how many tokens each expert gets depends on the data, the sizes of the tensors do not"
    ]
    experts = [module for module in layout(architecture).block if module.role == "experts"]
    folded = [module for module in experts if targets_stack(job, module)]
    if folded:
        block_bytes = sum(prod(module.shape) for module in folded) * DTYPE_BYTES[job.dtype]
        kept = (
            ""
            if job.activation_checkpointing == "full"
            else ", kept until backward where it is not recomputed"
        )
        notes.append(
            f"peft folds adapters on experts into a copy of their weights, {format_bytes(block_bytes)} per block in "
            f"every forward pass{kept}; adapters on attention alone need none"
        )
    return tuple(notes)
