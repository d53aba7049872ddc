"""What the software that runs a job does where versions, loops and kernels differ, each with its source."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from memplan.job.spec import Job
from memplan.tape.backends import AMPERE, TORCH, Target
from memplan.tape.liger import FAMILIES as LIGER_FAMILIES
from memplan.tape.multiprocessors import A100, Multiprocessors, multiprocessors
from memplan.tape.sharded.sharding import SHARDED
from memplan.tape.sharded.zero_groups import zero_stage
from memplan.tape.software import (
    GptqSoftware,
    compute_capability,
    cublas_workspace,
    cublaslt_workspace,
    expert_masks,
    version_numbers,
)

TRANSFORMERS = "5.23.0"
"""The version that the programs follow."""
TRANSFORMERS_OF_QWEN = "4.37.2"
"""The latest that runs Qwen 1's own code (requirements.txt of QwenLM/Qwen)."""

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
    slices_hidden: bool = False
    """
    The head is given `hidden_states[:, -k:, :]`, of which k = 0 takes all: transformers since 4.45, Granite since 4.48
    (modeling_granite.py). It matters before torch 2.9 (tape/views.py, whole_slices).
    """
    hold_hidden: bool = False
    """The last hidden states live until the loss is there: locals of transformers' `forward`."""
    shift_logits: bool = False
    """
    The loss is of a copy of the float32 logits without the last position, both held: transformers before 4.49
    (loss_utils.py; before 4.46 in each model's `forward`).
    """
    float_logits: bool = False
    """
    `forward` itself makes the logits float32 and drops the 16-bit ones: transformers before 4.46, Granite before 4.48
    (modeling_granite.py).
    """
    upcast_logits: bool = True
    """float32 copy of the logits before the loss (transformers: always; a loss kernel of its own may not)."""
    float_output: bool = False
    """accelerate's convert_outputs_to_fp32: with mixed precision the model's output is copied to float32."""
    prefetch: bool = False
    """
    All micro batches of a step are on the device before the first of them is used, and their targets are counted
    there: transformers' Trainer since 4.46 (trainer.py, get_batch_samples).
    """
    use_cache: bool = False
    """A DynamicCache is filled during training: `use_cache` left at its default and no checkpointing."""
    input_gradients: bool = False
    """enable_input_require_grads, which peft's and TRL's recipes call for checkpointing."""
    reentrant: bool = False
    """
    Checkpointing with use_reentrant=True: transformers' default before 5 (modeling_utils.py), and what a script or a
    trainer may ask for.
    """
    accelerate_fsdp2: bool = False
    """
    FSDP2 as accelerate sets it up (tape/sharded/fsdp2_accelerate.py), which transformers' Trainer uses since 5
    (training_args.py, _process_fsdp_args). Mixed precision is FSDP2's alone, without autocast: parameters are gathered,
    gradients reduced and outputs given in 16 bits, and what trains is stored in float32 unless a base is in 4 bits
    (utils/dataclasses.py, set_mixed_precision; utils/fsdp_utils.py, fsdp2_prepare_model). Packed weights are bytes,
    which are left out of the units: whole on every rank.
    """
    clones_output: bool = False
    """
    DDP clones what the model returns (torch/nn/parallel/distributed.py, _DDPSink), and lays its buckets out once: the
    Trainer has it look for unused parameters, unless a model of transformers' own is checkpointed (trainer.py,
    _build_accelerator_args).
    """
    fsdp1: bool = False
    """
    FSDP of torch.distributed.fsdp: units are flat (tape/sharded/sharding.py), and for a frozen unit it registers a hook
    on the gradients of the unit's inputs, whose handle keeps them until backward ends; with reentrant checkpointing
    those are the blocks' inputs, cut off their graph, and their gradients
    (_runtime_utils.py, _register_post_backward_reshard_only_hook).
    """
    recomputes_units: bool = False
    """
    Reentrant checkpointing is around FSDP1's units: transformers' models call their blocks, which are wrapped, from the
    checkpoint (modeling_llama.py, LlamaModel.forward, before 5). Not where a script puts checkpoints into the units, as
    torch's apply_activation_checkpointing does to a wrapped model.
    """
    attention_waits: bool = False
    """
    Before every flash attention the host asks the device whether positions fall, and so waits for it: transformers
    4.45 to 4.48 (modeling_flash_attention_utils.py, _flash_attention_forward). It matters where streams hand blocks on.
    """
    wrapped_dtype: str | None = None
    """
    What FSDP1 is given to wrap, where it is not the dtype that trains: a model loaded in 16 bits, of which accelerate
    makes the shards that train float32 when all of it is wrapped (accelerate/accelerator.py, prepare_model).
    """
    upcasts_flat: bool = False
    """
    With mixed precision accelerate makes FSDP1's flat parameters that train float32 once they are wrapped
    (accelerate/accelerator.py, prepare_model).
    """
    original_parameters: bool = False
    """
    FSDP1's `use_orig_params`: a layer that is not gathered shows its shard, with the dtype that is stored. peft asks an
    adapter for its dtype before it is gathered, and casts its input to that (tuners/lora/layer.py, Linear.forward).
    """
    rank: int = 0
    """Of FSDP1, whose flat shards end inside tensors: each rank has other parts of them."""
    checkpoints_forward: bool = True
    """
    A block's checkpoint is around its `forward`, so that hooks, such as those of FSDP2, stay outside of it and a
    recomputation does not run them again: transformers from 5.23 on; before that it was around `__call__`
    (modeling_layers.py, GradientCheckpointingLayer).
    """
    repeat_key_heads: bool = False
    """
    The kernel gets a key and value head per query head: sdpa before 4.54, flash_attention_2 with Mistral before 4.48.
    """
    padding_mask: bool = False
    """Batches are padded, so that sdpa is given a mask."""
    mask_in_batch: bool = False
    """
    Batches hold a mask of ones beside ids and labels: transformers' collators take it from `tokenizer.pad`
    (data/data_collator.py), TRL's makes one (trainer/sft_trainer.py, DataCollatorForLanguageModeling).
    """
    starts_in_batch: bool = False
    """
    Batches say where their documents begin, so that flash attention looks at no positions: TRL's without padding.
    """
    sums_masks: bool = True
    """
    Whether a mask masks anything is seen from its sum: transformers since 5.14; before that `all` of it is
    asked for (masking_utils.py, fast_all).
    """
    check_packing: bool = True
    """Positions are looked at for packed documents: transformers from 4.54 on (masking_utils.py)."""
    remap_positions: bool = True
    """
    The mask of packed documents asks for the document first, then for the order of the positions in it: transformers
    from 5.23 on; before that, for the order in the row first (masking_utils.py, create_causal_mask).
    """
    rotary_product: bool = False
    """
    The angles of the rotary tables are a batched product of frequencies and positions, which takes cuBLAS's workspace:
    transformers before 5.19 (modeling_llama.py, LlamaRotaryEmbedding.forward); since then they are multiplied.
    """
    checks_all_rows: bool = False
    """
    Before each call of the flash-attn package the positions are looked at for packed documents also where the batch has
    several rows, which cannot hold them that way: transformers before 5.20 (modeling_flash_attention_utils.py,
    _is_packed_sequence).
    """
    expert_masks: str = "none"
    """
    Which rows of experts are masked where none are on other ranks: transformers 5.17 masks the inputs and the outputs
    of both products ("products"), 5.13 to 5.16 the inputs of the first one and the weighted sum ("sum"); since 5.18
    "none" are (integrations/moe.py, grouped_mm_experts_forward).
    """
    expert_deltas: bool = False
    """
    Adapters of experts are multiplied out, and the result is added to the weights: peft before 0.21; since then one
    product does both (tuners/lora/layer.py, ParamWrapper).
    """
    rotary_tables: str | None = None
    """
    The dtype of the rotary tables of all positions that every block of a Llama keeps as buffers, where it does:
    transformers before 4.38 (modeling_llama.py, LlamaRotaryEmbedding._set_cos_sin_cache).
    """
    trainer_scalars: bool = False
    """
    The scalars of transformers' Trainer: its running loss, the tokens of a step, by which the model divides its loss,
    accelerate's division by the accumulation steps, and the norm of the gradients, kept for its log (trainer.py).
    Written as transformers 5 has them, without DeepSpeed, which has its own backward pass and step.
    """
    divides_tokens: bool = True
    """The Trainer divides a step's tokens by the devices of a batch, even one: transformers since 5.19 (trainer.py)."""
    compute_capability: tuple[int, int] = AMPERE
    """Of the card, which decides what sdpa's kernels take; that of an A100 where none is known."""
    multiprocessors: Multiprocessors = A100
    """Of the card, which decide into how many parts sums over rows are cut (tape/scratch.py, column_sum)."""
    torch: tuple[int, ...] = TORCH
    """The version of torch, which decides in what order sdpa tries its kernels (tape/backends.py)."""
    attention_kernel: str = "auto"
    """The kernel that the job wants of sdpa."""
    first_length: int | None = None
    """Tokens per sequence of the first step, where lengths vary: what a script still holds of a shorter batch."""
    triton_loss: bool = False
    triton_norm: bool = False
    triton_rotary: bool = False
    """Kernels of tape/kernels.py in place of transformers' operations."""
    liger: bool = False
    """Norms, rotary positions and gated MLPs are Liger's (tape/liger.py)."""
    fused_lora: bool = False
    """Unsloth's LoRA operations over 4-bit layers (tape/fused_lora.py)."""
    keeps_4bit_input: bool = False
    """
    The node of a 4-bit product has its input as an attribute, until its graph goes: bitsandbytes before 0.43.2
    (autograd/_functions.py, MatMul4Bit; bitsandbytes#1270). Planned with reentrant checkpointing.
    """
    adds_in_place: bool = False
    """An adapter's output is added to the layer's in place: peft before 0.9 (tuners/lora/layer.py and bnb.py)."""
    whole_adapters: bool = False
    """
    Adapters are left out of FSDP1: every rank has all of them and their states, and adds up their gradients by a hook.
    fms-acceleration does so where it fuses LoRA (fused-ops-and-kernels, utils.py, lora_adapters_switch_ddp_from_fsdp).
    """
    liger_before_0_5: bool = False
    """Liger's fused loss in its first form (tape/kernels.py)."""
    casts_embedding_back: bool = False
    """
    With bf16, TRL's SFTTrainer gives a 4-bit model that peft has prepared its embedding and its head in bfloat16 again;
    norms and biases stay in float32 (trl 0.11, trainer/utils.py, peft_module_casting_to_bf16).
    """
    loads_on_device: bool = False
    """
    `from_pretrained` puts the weights on the device itself, as it does with every 4-bit model and wherever it is given
    a `device_map`: it takes one block of the model's size and frees it, and the tensors are cut from that segment
    (transformers 5, modeling_utils.py, caching_allocator_warmup).
    """
    gptq: GptqSoftware = field(default_factory=GptqSoftware)
    """What computes with weights that GPTQ has quantised."""
    packs_subclasses: bool = False
    """
    `from_pretrained` packs subclasses of torch's linear layer, such as Falcon's, into 4 bits as well: transformers
    before 5.5 (integrations/bitsandbytes.py, replace_with_bnb_linear).
    """
    products_before: bool = False
    """
    The process has multiplied matrices, with a bias and in backward too, before it loads the model: cuBLAS has its
    workspaces.
    """

    @property
    def cublas_workspace_bytes(self) -> int:
        """What cuBLAS keeps per handle and stream."""
        return cublas_workspace(self.torch, self.compute_capability)

    @property
    def cublaslt_workspace_bytes(self) -> int:
        """What cuBLASLt keeps beside it."""
        return cublaslt_workspace(self.torch)

    def target(self, device: str) -> Target:
        """What chooses attention's kernel on `cuda` or `cpu`."""
        return Target(
            device, self.compute_capability, self.torch, self.attention_kernel, self.multiprocessors
        )

    @staticmethod
    def for_job(job: Job) -> Behaviour:
        """The loop and the card that the job names, in the versions at hand."""
        trainer, script = job.loop == "hf_trainer", job.loop == "script"
        adapters = job.method in ("lora", "qlora")
        capability = compute_capability(job.gpu) or AMPERE
        shards = trainer and job.parallel.strategy in SHARDED
        fsdp1 = shards and job.parallel.fsdp_version == 1
        accelerate_fsdp2 = shards and not fsdp1
        ddp = trainer and job.world_size > 1 and job.parallel.strategy == "NO_SHARD"
        reentrant = (trainer or script) and job.use_reentrant and job.activation_checkpointing != "none"
        return Behaviour(
            hold_logits=script,
            hold_hidden=script or trainer,
            use_cache=script and job.activation_checkpointing == "none",
            float_output=trainer and job.autocast is not None and not accelerate_fsdp2,
            accelerate_fsdp2=accelerate_fsdp2,
            fsdp1=fsdp1,
            upcasts_flat=fsdp1 and job.autocast is not None,
            original_parameters=fsdp1,
            clones_output=ddp and (adapters or job.activation_checkpointing == "none"),
            prefetch=trainer,
            trainer_scalars=trainer and not zero_stage(job),
            mask_in_batch=trainer and not job.padding_free,
            starts_in_batch=trainer and job.padding_free and job.loss == "chunked",
            # The Trainer switches checkpointing on as users do, and transformers 5 then makes the output of the
            # embeddings require gradients (modeling_utils.py, activation_checkpointing_enable).
            # So does peft's prepare_model_for_kbit_training.
            # So does peft where a model that gets adapters is checkpointed, and reentrant checkpoints need it.
            input_gradients=(reentrant and adapters)
            or (
                job.activation_checkpointing == "full"
                and (
                    (trainer and adapters)
                    or (script and job.method == "qlora" and job.quantization.kbit_preparation)
                )
            ),
            reentrant=reentrant,
            loads_on_device=(script or trainer)
            and (job.has_quantized_base and not job.has_gptq_base)  # that is on the host first
            and job.parallel.strategy in ("NO_SHARD", "ZERO_3"),
            compute_capability=capability,
            multiprocessors=multiprocessors(job.gpu),
            attention_kernel=job.attention_kernel,
        )

    @staticmethod
    def for_model(job: Job, family: str) -> Behaviour:
        """As `for_job`, of a model that not every version runs."""
        if family != "qwen":
            has_liger = job.kernels == "liger" and family in LIGER_FAMILIES
            return replace(Behaviour.for_job(job), liger=has_liger)
        return Behaviour.for_software(job, {"transformers": TRANSFORMERS_OF_QWEN}, family=family)

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
        transformers = version_numbers(versions.get("transformers", TRANSFORMERS))
        peft = version_numbers(versions["peft"]) if "peft" in versions else None
        old_trainer = transformers < (5,)
        flags: dict[str, Any] = dict.fromkeys(kernels, True)
        adapters = job.method in ("lora", "qlora")
        checkpointing = job.activation_checkpointing != "none"
        at_hand = Behaviour.for_job(job)
        fsdp1 = (job.parallel.strategy in SHARDED and old_trainer) or at_hand.fsdp1
        return replace(
            at_hand,
            accelerate_fsdp2=at_hand.accelerate_fsdp2 and not fsdp1,
            float_output=job.loop == "hf_trainer"
            and job.autocast is not None
            and (fsdp1 or at_hand.float_output),
            torch=version_numbers(versions["torch"]) if "torch" in versions else TORCH,
            shift_logits=transformers < (4, 49),
            slices_hidden=transformers >= ((4, 48) if family == "granite" else (4, 45)),
            float_logits=family != "qwen" and transformers < ((4, 48) if family == "granite" else (4, 46)),
            upcast_logits=family != "qwen",
            prefetch=job.loop == "hf_trainer" and transformers >= (4, 46),
            trainer_scalars=Behaviour.for_job(job).trainer_scalars and not old_trainer,
            # peft's PeftModel and prepare_model_for_kbit_training both call it where checkpointing is on.
            input_gradients=adapters and checkpointing,
            reentrant=checkpointing and (old_trainer or at_hand.reentrant),
            fsdp1=fsdp1,
            recomputes_units=fsdp1 and checkpointing and old_trainer,
            attention_waits=fsdp1
            and job.attention == "flash_attention_2"
            and (4, 45) <= transformers < (4, 49),
            keeps_4bit_input=checkpointing
            and old_trainer
            and version_numbers(versions.get("bitsandbytes", "1")) < (0, 43, 2),
            adds_in_place=peft is not None and peft < (0, 9),
            whole_adapters=fsdp1 and "fused_lora" in kernels,
            repeat_key_heads=transformers < ((4, 54) if job.attention == "sdpa" else (4, 48))
            and (job.attention == "sdpa" or family == "mistral"),
            padding_mask=padded,
            sums_masks=transformers >= (5, 14),
            check_packing=transformers >= (4, 54),
            checkpoints_forward=transformers >= (5, 23),
            remap_positions=transformers >= (5, 23),
            rotary_tables=job.dtype if family == "llama" and transformers < (4, 38) else None,
            rotary_product=transformers < (5, 19),
            checks_all_rows=(5,) < transformers < (5, 20),
            expert_masks=expert_masks(transformers),
            expert_deltas=peft is not None and peft < (0, 21),
            divides_tokens=transformers >= (5, 19),
            casts_embedding_back=(
                "trl" in versions and job.quantization.kbit_preparation and job.autocast == "bfloat16"
            ),
            loads_on_device=Behaviour.for_job(job).loads_on_device and not old_trainer,
            packs_subclasses=transformers < (5, 5),
            gptq=GptqSoftware.of(versions),
            liger_before_0_5=transformers < (4, 49),
            **flags,
        )
