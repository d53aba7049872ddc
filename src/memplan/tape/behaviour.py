"""What the software that runs a job does where versions, loops and kernels differ, each with its source."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from memplan.job.spec import Job

CUBLAS_WORKSPACE_BYTES = 8_519_680
"""Per handle and stream before Hopper: 4096 KiB * 2 + 16 KiB * 8 (ATen/cuda/CublasHandlePool.cpp)."""
CUBLAS_WORKSPACE_BYTES_HOPPER = 32 << 20

KERNELS = ("triton_loss", "triton_norm", "triton_rotary", "fused_lora")
"""Replacements of transformers' operations: fields of `Behaviour`."""


@dataclass(frozen=True)
class Behaviour:
    """
    What the software that runs the job does, where versions and loops differ. Sources beside each field.

    `for_job` gives that of the versions memplan plans for; `for_software` that of named versions.
    """

    hold_logits: bool = False
    """The model's output lives through backward, until the next step's replaces it: a script that keeps it."""
    step_is_function: bool = False
    """A script whose step is a function: the output that it keeps goes when it returns."""
    hold_hidden: bool = False
    """The last hidden states live until the loss is there: locals of transformers' `forward`."""
    shift_logits: bool = False
    """
    The loss is of a copy of the float32 logits without the last position, both held: transformers before 4.49
    (loss_utils.py; before 4.46 in each model's `forward`).
    """
    float_logits: bool = False
    """`forward` itself makes the logits float32 and drops the 16-bit ones: transformers before 4.46."""
    upcast_logits: bool = True
    """float32 copy of the logits before the loss (transformers: always; a loss kernel of its own may not)."""
    float_output: bool = False
    """accelerate's convert_outputs_to_fp32: with mixed precision the model's output is copied to float32."""
    use_cache: bool = False
    """A DynamicCache is filled during training: `use_cache` left at its default and no checkpointing."""
    input_gradients: bool = False
    """enable_input_require_grads, which peft's and TRL's recipes call for checkpointing."""
    reentrant: bool = False
    """Checkpointing with use_reentrant=True: transformers' default before 5 (modeling_utils.py)."""
    fsdp1: bool = False
    """
    FSDP of torch.distributed.fsdp: units are flat (tape/sharding.py), and for a frozen unit it registers a hook on
    the gradients of the unit's inputs, whose handle keeps them until backward ends; with reentrant checkpointing
    those are the blocks' inputs, cut off their graph, and their gradients
    (_runtime_utils.py, _register_post_backward_reshard_only_hook).
    """
    repeat_key_heads: bool = False
    """
    The kernel gets a key and value head per query head: sdpa before 4.54, flash_attention_2 with Mistral before 4.48.
    """
    padding_mask: bool = False
    """Batches are padded, so that sdpa is given a mask and takes the memory-efficient kernel."""
    before_ampere: bool = False
    """The card is older than sm80, for which sdpa has fewer kernels."""
    first_length: int | None = None
    """Tokens per sequence of the first step, where lengths vary: what a script still holds of a shorter batch."""
    triton_loss: bool = False
    triton_norm: bool = False
    triton_rotary: bool = False
    """Kernels of tape/kernels.py in place of transformers' operations."""
    fused_lora: bool = False
    """Unsloth's LoRA operations over 4-bit layers (tape/fused_lora.py)."""
    liger_before_0_5: bool = False
    """Liger's fused loss in its first form (tape/kernels.py)."""
    cublas_workspace_bytes: int = CUBLAS_WORKSPACE_BYTES

    @staticmethod
    def for_job(job: Job) -> Behaviour:
        """The loop and the card that the job names, in the versions at hand."""
        trainer, script = job.loop == "hf_trainer", job.loop == "script"
        capability = _compute_capability(job.gpu)
        return Behaviour(
            hold_logits=script,
            hold_hidden=script or trainer,
            use_cache=script and job.activation_checkpointing == "none",
            float_output=trainer and job.autocast is not None,
            before_ampere=capability < (8, 0),
            cublas_workspace_bytes=(
                CUBLAS_WORKSPACE_BYTES_HOPPER if capability[0] == 9 else CUBLAS_WORKSPACE_BYTES
            ),
        )

    @staticmethod
    def for_software(
        job: Job,
        versions: Mapping[str, str],
        *,
        family: str,
        kernels: Collection[str] = (),
        padded: bool = False,
    ) -> Behaviour:
        """
        The loop that the job names, in these versions (`transformers`, ...; one not named is that at hand).

        `family` is the model's `model_type`; `kernels` are of KERNELS; `padded`: batches hold padding.
        """
        transformers = _version(versions.get("transformers", "5"))
        old_trainer = transformers < (5,)
        adapters = job.method in ("lora", "qlora")
        checkpointing = job.activation_checkpointing != "none"
        return replace(
            Behaviour.for_job(job),
            shift_logits=transformers < (4, 49),
            float_logits=transformers < (4, 46),
            # peft's PeftModel and prepare_model_for_kbit_training both call it where checkpointing is on.
            input_gradients=adapters and checkpointing,
            reentrant=checkpointing and old_trainer,
            fsdp1=job.parallel.strategy in ("FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD") and old_trainer,
            repeat_key_heads=transformers < ((4, 54) if job.attention == "sdpa" else (4, 48))
            and (job.attention == "sdpa" or family == "mistral"),
            padding_mask=padded,
            liger_before_0_5=transformers < (4, 49),
            **dict.fromkeys(kernels, True),
        )


def _compute_capability(gpu: str | None) -> tuple[int, int]:
    """Of the card that a job names; that of an A100 where it names none, or one that is not in the catalogue."""
    from memplan.gpu.catalogue import match_gpu

    profile = None if gpu is None else match_gpu(gpu)
    return (8, 0) if profile is None or profile.compute_capability is None else profile.compute_capability


def _version(text: str) -> tuple[int, ...]:
    """
    The numbers of a version.

    >>> _version("4.45.2")
    (4, 45, 2)
    """
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())
