"""
The shape writer: a job and an architecture in, the tape of loading and of training steps out, without torch.

The programs run over a few blocks per kind of block; repeat.py writes the rest.
"""

from __future__ import annotations

from dataclasses import replace

from memplan.errors import JobError, UnknownModel
from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.model.families import REMOTE_CODE
from memplan.tape.behaviour import Behaviour
from memplan.tape.builder import Builder
from memplan.tape.encoders import refuse_for_encoder
from memplan.tape.graph import Graph
from memplan.tape.hooks import Units
from memplan.tape.loop import Loop, Optimizer, Recording
from memplan.tape.model import build_model
from memplan.tape.optimizer import OptimizerProgram
from memplan.tape.packing import refuse_left_in_16_bits
from memplan.tape.parts import Model
from memplan.tape.programs import FAMILIES
from memplan.tape.sharded.fsdp1 import Fsdp1Units
from memplan.tape.sharded.fsdp2 import Fsdp2Units
from memplan.tape.sharded.fsdp2_accelerate import AccelerateUnits
from memplan.tape.sharded.zero import ZeroOptimizer
from memplan.tape.sharded.zero3 import Zero3Optimizer
from memplan.tape.sharded.zero_groups import zero_stage
from memplan.tape.stored import refuse_unlike_stored
from memplan.tape.targets import check_targets

NPT_FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
"""Families whose blocks `memplan.npt` converts; Mistral counts as `llama`."""


def record(
    job: Job,
    architecture: Architecture,
    layers: list[int],
    *,
    num_steps: int,
    first_step: int = 1,
    read_bytes: int | None = None,
    device: str = "cuda",
    behaviour: Behaviour | None = None,
) -> Recording:
    """
    Run the job's program over these blocks of the model: loading, and the steps `first_step` to `num_steps`. A later
    first step finds the optimizer's states in place, as one does that continues from a checkpoint (`read_bytes`: of its
    largest tensor).
    """
    if architecture.family not in FAMILIES:
        raise UnknownModel(
            f"the shape writer has no program for `{architecture.family}` models (`{architecture.name}`)",
            hint=f"families with a program: {', '.join(FAMILIES)}",
        )
    _refuse_what_does_not_run(job, architecture)
    check_targets(job, architecture)
    behaviour = behaviour or Behaviour.for_model(job, architecture.family)
    if not behaviour.packs_subclasses:
        refuse_left_in_16_bits(job, architecture.family)
    if job.method == "npt":
        # Converted models train in eval mode: a teacher with dropout is a noisy one.
        architecture = replace(
            architecture, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0
        )
    g = Graph(device)
    g.target = behaviour.target(device)
    if device == "cuda":
        g.workspace_bytes = behaviour.cublas_workspace_bytes
        g.bias_workspace_bytes = behaviour.cublaslt_workspace_bytes
    g.autocast = None if behaviour.accelerate_fsdp2 else job.autocast
    recording = Recording(g, layers=tuple(layers))
    recording.mark("load", 0)
    if behaviour.products_before:
        g.begin("before")
        g.claim_workspaces()
    builder = Builder(g, job, architecture, layers, behaviour)
    checkpointed = checkpointed_layers(job, architecture.num_hidden_layers)
    converted = npt_layers(job, architecture)
    model = build_model(builder, converted, checkpointed)
    g.units = None if zero_stage(job) else _units(g, job, builder, behaviour)
    if isinstance(g.units, Fsdp2Units) and job.method == "qlora" and builder.cuts:
        _check_packed_shards(g, g.units, builder)
    recording.num_trainable = len(model.trainable)
    optimizer = _optimizer(g, job, model, builder)
    loop = Loop(g, job, model, behaviour, recording, num_converted=len(converted))
    if first_step > 1 or read_bytes is not None:
        optimizer.create_states()
    if read_bytes is not None and device == "cpu":  # on CUDA a tensor passes through the host's memory
        g.begin("checkpoint")
        g.scratch(read_bytes, name="a tensor of the checkpoint")
    if first_step > 1 and job.method == "npt":
        from memplan.tape.npt import measured_before

        measured_before(g, model.blocks, loop.settings)
    for step in range(first_step, num_steps + 1):
        loop.step(step, optimizer)
    if evaluates(job):
        loop.evaluate(num_steps)
    recording.mark("end", num_steps)
    recording.events = g.events[:]  # what is freed from here on, when the model goes, is not part of the tape
    return recording


def _check_packed_shards(g: Graph, units: Fsdp2Units, builder: Builder) -> None:
    """
    The trainer gathers a layer of every shape to see whether it computes what it did when it was packed
    (train/quantize.py, check_sharded); the rows that it multiplies, of a few KiB, are left out.
    """
    for number, layer in enumerate(builder.packed_shapes.values()):
        g.begin(f"check of packed shards {number}")
        g.enter(layer)
        units.check(layer)
    g.enter(None)


def _units(g: Graph, job: Job, builder: Builder, behaviour: Behaviour) -> Units | None:
    """What gathers and reduces the model's units, if anything does."""
    degrees = builder.layout
    if not (degrees.gathers or degrees.gradients > 1):
        return None
    if behaviour.fsdp1:
        has_adapter_units = job.method in ("lora", "qlora") and not behaviour.whole_adapters
        return Fsdp1Units(
            g,
            degrees,
            builder.contents,
            adapter_units=has_adapter_units,
            recomputes_units=behaviour.recomputes_units,
            wrapped=builder.wrapped,
            prefetch=job.parallel.backward_prefetch,
        )
    if behaviour.accelerate_fsdp2:
        return AccelerateUnits(
            g,
            degrees,
            builder.contents,
            reduce_dtype=job.autocast,
            is_tied=builder.architecture.tie_word_embeddings,
            norm_is_last=job.method == "full" and not builder.architecture.is_encoder,
        )
    return Fsdp2Units(g, degrees, builder.contents, has_backward=job.method != "npt")


def _optimizer(g: Graph, job: Job, model: Model, builder: Builder) -> Optimizer:
    """What steps the model's parameters; DeepSpeed's also hooks on to its passes."""
    hidden_size = model.architecture.hidden_size
    if zero_stage(job) == 3:
        g.units = sharded = Zero3Optimizer(g, job, builder.parameters, model.trainable, hidden_size)
        return sharded
    if zero_stage(job):
        g.units = zero = ZeroOptimizer(g, job, model.trainable, hidden_size)
        return zero
    return OptimizerProgram(
        g,
        job,
        model.trainable,
        _num_trainable(model, model.architecture, builder.layers),
        [
            model.embedding.name,
            *(name for name, parameter in model.outside.items() if len(parameter.shape) > 1),
        ],
    )


def _refuse_what_does_not_run(job: Job, architecture: Architecture) -> None:
    if job.loop == "memplan" and architecture.family in REMOTE_CODE:
        raise JobError(
            f"the code of `{architecture.name}` is beside its weights on the hub, and memplan's own trainer runs "
            "models of transformers alone",
            hint="use `--set loop=hf_trainer`, or `script`",
        )
    if architecture.is_encoder:
        refuse_for_encoder(job)
    refuse_unlike_stored(job, architecture.stored)
    if job.has_gptq_base and architecture.num_experts:
        raise UnknownModel(
            f"`{architecture.name}` has experts, and how layers in GPTQ's format stand for them is not planned",
            hint="use `--set quantization.type=nf4`, which leaves experts in 16 bits",
        )
    if job.attention == "sdpa" and architecture.attn_logit_softcapping is not None:
        # sdpa_attention_forward raises ValueError (transformers/integrations/sdpa_attention.py).
        raise JobError(
            f"`{architecture.name}` caps its attention scores, which `attention: sdpa` cannot",
            hint="use `--set attention=eager`",
        )
    if job.method == "npt" and architecture.family not in NPT_FAMILIES:
        raise UnknownModel(
            f"blocks of `{architecture.family}` models (`{architecture.name}`) cannot become NPT blocks",
            hint=f"these can: {', '.join(NPT_FAMILIES)}",
        )


def _num_trainable(model: Model, architecture: Architecture, layers: list[int]) -> int:
    """Number of trainable tensors of the whole model, from that of the blocks at hand."""
    inside = sum(parameter.layer is not None for parameter in model.trainable)
    outside = len(model.trainable) - inside
    return outside + inside * architecture.num_hidden_layers // max(1, len(layers))


def npt_layers(job: Job, architecture: Architecture) -> frozenset[int]:
    """Blocks that the job converts to NPT."""
    if job.method != "npt":
        return frozenset()
    from memplan.npt.layers import layer_indices

    return frozenset(layer_indices(job.npt.layers, architecture.num_hidden_layers))


def checkpointed_layers(job: Job, num_layers: int) -> frozenset[int]:
    """Blocks of so many that are recomputed in backward: all, every second one, or none."""
    every = {"none": None, "selective": 2, "full": 1}[job.activation_checkpointing]
    if every is None:
        return frozenset()
    return frozenset(range(every - 1, num_layers, every))


def evaluates(job: Job) -> bool:
    """Whether the tape ends with an evaluation: by the trainer's own loop, which has no DeepSpeed."""
    return job.data.eval is not None and job.loop == "memplan" and not zero_stage(job)
