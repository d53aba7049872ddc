"""
The shape writer: a job and an architecture in, the tape of loading and of training steps out, without torch.

The programs run over a few blocks per kind of block; repeat.py writes the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from math import prod

from memplan.errors import JobError, UnknownModel
from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.tape.behaviour import Behaviour as Behaviour
from memplan.tape.encoders import refuse_for_encoder
from memplan.tape.engine import backward
from memplan.tape.fsdp1 import Fsdp1Units
from memplan.tape.fsdp2 import Fsdp2Units
from memplan.tape.graph import Graph
from memplan.tape.hooks import Units
from memplan.tape.kernels import liger_loss, triton_cross_entropy
from memplan.tape.loss import chunked_loss, cross_entropy, full_loss
from memplan.tape.model import Builder
from memplan.tape.modules import entered, left
from memplan.tape.ops import cast, scale, unary_saving_output
from memplan.tape.optimizer import OptimizerProgram
from memplan.tape.parts import Model
from memplan.tape.programs import FAMILIES, Settings, decoder
from memplan.tape.programs import logits as logits_of
from memplan.tape.sharding import whole_root
from memplan.tape.targets import check_targets
from memplan.tape.tensors import Tensor
from memplan.tape.zero import ZeroOptimizer
from memplan.tape.zero3 import Zero3Optimizer
from memplan.tape.zero_groups import zero_stage

Optimizer = OptimizerProgram | ZeroOptimizer | Zero3Optimizer

NPT_FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
"""Families whose blocks `memplan.npt` converts; Mistral counts as `llama`."""


@dataclass
class Recording:
    """What the programs wrote: the graph's raw events, and where phases begin in them."""

    graph: Graph
    events: list[int] = field(default_factory=list)
    marks: list[tuple[int, str, int]] = field(default_factory=list)
    layers: tuple[int, ...] = ()
    num_trainable: int = 0

    def mark(self, phase: str, step: int) -> None:
        self.marks.append((len(self.graph.events), phase, step))


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
    behaviour = behaviour or Behaviour.for_job(job)
    if job.method == "npt":
        # Converted models train in eval mode: a teacher with dropout is a noisy one.
        architecture = replace(
            architecture, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0
        )
    g = Graph(device)
    g.target = behaviour.target(device)
    if device == "cuda":
        g.workspace_bytes = behaviour.cublas_workspace_bytes
    g.autocast = job.autocast
    recording = Recording(g, layers=tuple(layers))
    recording.mark("load", 0)
    if behaviour.products_before:
        g.begin("before")
        g.claim_workspaces()
    builder = Builder(g, job, architecture, layers, behaviour)
    checkpointed = checkpointed_layers(job, architecture.num_hidden_layers)
    model = builder.build(npt_layers(job, architecture), checkpointed)
    g.units = None if zero_stage(job) else _units(g, job, builder, behaviour)
    recording.num_trainable = len(model.trainable)
    optimizer = _optimizer(g, job, model, builder)
    loop = Loop(g, job, model, behaviour, recording)
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


def _units(g: Graph, job: Job, builder: Builder, behaviour: Behaviour) -> Units | None:
    """What gathers and reduces the model's units, if anything does."""
    degrees = builder.layout
    if not (degrees.gathers or degrees.gradients > 1):
        return None
    if behaviour.fsdp1:
        has_adapter_units = job.method in ("lora", "qlora") and not behaviour.whole_adapters
        return Fsdp1Units(g, degrees, builder.contents, adapter_units=has_adapter_units)
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
        [name for name, parameter in model.outside.items() if len(parameter.shape) > 1],
    )


def _refuse_what_does_not_run(job: Job, architecture: Architecture) -> None:
    if architecture.is_encoder:
        refuse_for_encoder(job)
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


class Loop:
    """The training loop: what it holds, and until when."""

    def __init__(self, g: Graph, job: Job, model: Model, behaviour: Behaviour, recording: Recording) -> None:
        self.g = g
        self.job = job
        self.model = model
        self.behaviour = behaviour
        self.recording = recording
        self.settings = Settings(job.attention, behaviour, offload_inputs=job.activation_offload)
        self.packed = job.packing and job.loop == "memplan"
        self.batch: tuple[Tensor, ...] = ()
        self.batches: list[tuple[Tensor, ...]] = []
        self.output: list[Tensor] = []
        self.metrics: list[Tensor] = []
        self.held_cache: list[tuple[int, Tensor]] = []

    def step(self, number: int, optimizer: Optimizer) -> None:
        """One optimizer step; from the third micro batch on nothing changes, so no more are written."""
        recording = self.recording
        is_own = self.job.loop == "memplan"
        total = self.sum_of_losses(number) if is_own and self.job.method != "npt" else None
        num_micro_batches = min(self.job.gradient_accumulation_steps, 3)
        for micro in range(1, num_micro_batches + 1):
            recording.mark("forward", number)
            if self.g.units is not None:
                self.g.units.is_last = micro == num_micro_batches
            length = self.behaviour.first_length if number == 1 else None
            length = length or self.job.max_seq_len
            self.g.begin(f"forward {number}.{micro}")
            self.load_batch(micro, length)
            if self.model.buckets is not None and micro == 1:  # the first after gradients were reduced
                self.model.buckets.rebuild()
            loss = self.forward(f"{number}.{micro}")
            if loss is not None:
                recording.mark("backward", number)
                self.g.begin(f"backward {number}.{micro}")
                if self.behaviour.fsdp1 and self.job.method != "full":
                    self.settings.kept = []
                backward(self.g, loss)
                self.release_kept(f"{number}.{micro}")
                del loss
            if is_own:
                self.batch, self.settings.position_ids = (), None
        self.add_up_gradients(number)
        self.metrics = []
        del total
        recording.mark("optimizer_step", number)
        optimizer.step(number)
        if self.behaviour.step_is_function:
            self.settings.cache = []
            self.replace_output([])
        optimizer.zero_grad(number)

    def add_up_gradients(self, number: int) -> None:
        """Of NPT, which no hook of DDP or FSDP sees: all of them in one tensor (train/parallel.py)."""
        if self.job.method != "npt" or self.job.world_size == 1:
            return
        recorded = sum(prod(parameter.shape) for parameter in self.model.trainable)
        num_recorded = len({parameter.layer for parameter in self.model.trainable})
        count = recorded * len(npt_layers(self.job, self.model.architecture)) // num_recorded
        self.g.begin(f"gradients added up {number}")
        flat = self.g.new((count,), "float32", "gradients of all NPT blocks", "comm")
        del flat

    def evaluate(self, number: int) -> None:
        """
        One batch of an evaluation after step `number` (train/loop.py): the model in eval mode, nothing saved for
        backward, with the optimizer's states in place.
        """
        self.recording.mark("evaluation", number)
        self.g.training = False
        with self.g.no_grad():
            self.g.begin(f"forward evaluation {number}")
            self.batch = self.new_batch(self.job.max_seq_len)
            if self.job.method == "npt":
                from memplan.tape.npt import evaluate

                num_converted = len(npt_layers(self.job, self.model.architecture))
                evaluate(self.g, self.model, self.batch, self.job, self.settings, num_converted)
            else:
                self.forward(f"evaluation {number}")
        self.g.leave_autocast()
        self.g.training = True

    def sum_of_losses(self, number: int) -> Tensor:
        self.g.begin(f"step {number}")
        return self.g.new((), "float32", "sum of losses", "logits_loss")

    def release_kept(self, label: str) -> None:
        """What FSDP1's hooks kept goes, block by block."""
        kept = self.settings.kept or []
        self.settings.kept = None
        self.g.begin(f"inputs freed {label}")
        while kept:
            self.g.enter(kept[-1][0].layer)
            kept.pop()
        self.g.enter(None)

    def load_batch(self, micro: int, length: int) -> None:
        """Micro batch number `micro` of a step takes the place of the one before."""
        if not self.behaviour.prefetch:
            self.batch = self.new_batch(length)
            return
        if micro == 1:
            self.batches = [self.new_batch(length) for _ in range(self.job.gradient_accumulation_steps)]
            for _, labels in self.batches:
                num_counted = length if self.model.architecture.is_encoder else length - 1
                counted = self.g.new((labels.shape[0], num_counted), "bool", "targets", "inputs")
                del counted
        self.batch = self.batches[micro - 1]

    def new_batch(self, length: int) -> tuple[Tensor, ...]:
        """Ids and labels on the device, and positions where rows are packed."""
        g, job = self.g, self.job
        shape = (job.micro_batch_size, length)
        if self.packed and job.attention == "flash_attention_2":
            shape = (1, prod(shape))  # the trainer hands it all documents in one row (train/data.py, flatten)
        ids = g.new(shape, "int64", "input ids", "inputs")
        labels = g.new(shape, "int64", "labels", "inputs")
        if self.packed:
            self.settings.position_ids = g.new(shape, "int64", "position ids", "inputs")
        return ids, labels

    def forward(self, label: str) -> Tensor | None:
        g, job = self.g, self.job
        ids, labels = self.batch
        self.settings.cache = []
        loss = None
        with whole_root(g):
            if job.method == "npt":
                from memplan.tape.npt import end_to_end_step, local_step, objective, read_metrics

                num_converted = len(npt_layers(job, self.model.architecture))
                if job.npt.objective == "end_to_end":
                    return end_to_end_step(g, self.model, ids, job, self.settings, label, num_converted)
                last_hidden = local_step(g, self.model, ids, job, self.settings)
                g.leave_autocast()
                del last_hidden
                self.metrics = read_metrics(g, num_converted)
                objective(g, num_converted)
            else:
                roots = ("PeftModel", "LoraModel", "head") if job.method == "lora" else ("head",)
                for root in roots:
                    entered(g, root)
                hidden = [decoder(g, self.model, ids, self.settings)]
                g.category = "logits_loss"
                with g.module("loss"):
                    loss = self.loss(hidden, labels)
                g.category = "activations"
                for root in reversed(roots):
                    loss = left(g, root, loss)
        return loss

    def loss(self, held: list[Tensor], labels: Tensor) -> Tensor:
        """`held` is the only reference to the hidden states, so that they can go as early as the loop lets them."""
        g, behaviour, head = self.g, self.behaviour, self.model.head
        softcapped = self.model.architecture.final_logit_softcapping is not None
        is_own, is_encoder = self.job.loop == "memplan", self.model.architecture.is_encoder
        form = self.job.loss_form(plain_head=head.is_plain)
        if form != "full" and not head.has_only_weight:
            raise JobError(
                f"`loss: {form}` needs an output head that is one linear layer without bias or adapter, not in 4 bits",
                hint="use `--set loss=full`, or keep `lm_head` out of `lora.target_modules` and in `quantization.skip`",
            )
        if form != "full":
            self.settings.input_leaf = None
        if form == "chunked":
            loss = self.on_head(held[0], lambda x: chunked_loss(g, x, head, labels, softcapped=softcapped))
            g.leave_autocast()
            return loss
        if form == "fused":
            hidden = held.pop()
            old = behaviour.liger_before_0_5
            loss = self.on_head(hidden, lambda x: liger_loss(g, x, head, labels, before_0_5=old))
            g.leave_autocast()
            return loss
        logits = logits_of(g, self.model, held[0])
        if not behaviour.hold_hidden:
            held.pop()
        if softcapped:
            logits = scale(g, logits, "logits over cap")
            logits = unary_saving_output(g, logits, "tanh of logits")
            logits = scale(g, logits, "capped logits")
        if behaviour.float_logits:
            logits = cast(g, logits, "float32")
        loss = full_loss(
            g,
            logits,
            labels,
            upcast=behaviour.upcast_logits and (is_own or not is_encoder),
            shift_logits=behaviour.shift_logits,
            divide=is_own,
            shifts=not is_encoder,
            kernel=triton_cross_entropy if behaviour.triton_loss else cross_entropy,
        )
        if behaviour.float_output:
            held.clear()
            g.leave_autocast()  # accelerate's copy comes after the region it has put around `forward`
            logits = cast(g, logits, "float32")
        if behaviour.hold_logits:
            held.clear()
            leaf = self.settings.input_leaf
            self.replace_output([logits, loss] if leaf is None else [logits, loss, leaf])
            del leaf
        self.settings.input_leaf = None
        self.g.leave_autocast()  # casts of weights live until autocast ends; the graph keeps its own
        return loss

    def on_head(self, hidden: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
        """A loss that multiplies with the head's weight itself."""
        weight, hooks = self.model.head.weight, self.g.hooks
        if hooks is None or weight is None:
            return loss(hidden)
        return hooks.run(("loss", weight), [weight], (hidden,), loss)

    def replace_output(self, output: list[Tensor]) -> None:
        """
        The model's new output takes the place of the one held since the last step: its loss, which keeps the leaves of
        its graph, its logits and its cache.
        """
        g = self.g
        self.output = output
        held, self.held_cache = self.held_cache, self.settings.cache
        held.reverse()
        g.begin(f"cache freed {len(g.stretches)}")
        while held:
            g.enter(held[-1][0])
            held.pop()
        g.enter(None)
