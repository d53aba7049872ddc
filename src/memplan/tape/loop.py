"""
The training loop as the shape writer runs it: batches, forward, loss, backward, the optimizer's step, and an evaluation
after the last one; what the loop holds, and until when.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

from memplan.errors import JobError
from memplan.job.spec import Job
from memplan.tape.batches import Batches
from memplan.tape.behaviour import Behaviour
from memplan.tape.engine import backward
from memplan.tape.graph import Attributes, Graph
from memplan.tape.kernels import liger_loss, triton_cross_entropy
from memplan.tape.loss import chunked_loss, cross_entropy, full_loss
from memplan.tape.modules import entered, left
from memplan.tape.ops import alias, cast, scale, scale_backward, unary_saving_output
from memplan.tape.optimizer import OptimizerProgram
from memplan.tape.parts import Model
from memplan.tape.programs import Settings, decoder
from memplan.tape.programs import logits as logits_of
from memplan.tape.sharded.fsdp2_accelerate import head_begins, head_ends
from memplan.tape.sharded.sharding import whole_root
from memplan.tape.sharded.zero import ZeroOptimizer
from memplan.tape.sharded.zero3 import Zero3Optimizer
from memplan.tape.tensors import Tensor
from memplan.tape.trl_head import Outputs, trl_forward, trl_loss
from memplan.tape.views import whole_slices

Optimizer = OptimizerProgram | ZeroOptimizer | Zero3Optimizer


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


class Loop:
    """The training loop: what it holds, and until when."""

    def __init__(
        self,
        g: Graph,
        job: Job,
        model: Model,
        behaviour: Behaviour,
        recording: Recording,
        *,
        num_converted: int,
    ) -> None:
        self.g = g
        self.job = job
        self.model = model
        self.behaviour = behaviour
        self.recording = recording
        self.num_converted = num_converted
        """Blocks of the whole model that have become NPT blocks."""
        self.settings = Settings(job.attention, behaviour, offload_inputs=job.activation_offload)
        self.batches = Batches(g, job, model.architecture, behaviour, self.settings)
        self.output: list[Tensor] = []
        self.metrics: list[Tensor] = []
        self.held_cache: list[tuple[int, Tensor]] = []
        self.held_attributes: Attributes = []
        """What the graph of the loss that is held has beside what it saved."""
        self.losses: dict[str, Tensor] = {}
        """What the Trainer keeps to log: the running loss, and the last one."""

    def step(self, number: int, optimizer: Optimizer) -> None:
        """One optimizer step; from the third micro batch on nothing changes, so no more are written."""
        recording = self.recording
        is_own = self.job.loop == "memplan"
        total = self.sum_of_losses(number) if is_own and self.job.method != "npt" else None
        num_micro_batches = min(self.job.gradient_accumulation_steps, 3)
        if self.behaviour.trainer_scalars and not self.losses:
            self.g.begin("running loss")
            self.losses["running"] = self.g.new((), "float32", "running loss", "logits_loss")
            if number > 1 and isinstance(optimizer, OptimizerProgram):
                self.losses["last"] = self.g.new((), "float32", "loss of the step before", "logits_loss")
                optimizer.kept_norm = self.g.new((), "float32", "norm of the step before", "workspace")
        for micro in range(1, num_micro_batches + 1):
            recording.mark("forward", number)
            if self.g.units is not None:
                self.g.units.is_last = micro == num_micro_batches
            length = self.behaviour.first_length if number == 1 else None
            length = length or self.job.max_seq_len
            self.g.begin(f"forward {number}.{micro}")
            self.batches.load(micro, length)
            if self.model.buckets is not None and micro == 1:  # the first after gradients were reduced
                self.model.buckets.rebuild()
            loss = self.forward(f"{number}.{micro}")
            if loss is not None:
                recording.mark("backward", number)
                self.g.begin(f"backward {number}.{micro}")
                # Inside a unit a checkpoint cuts off none of the unit's inputs, which are those that hooks keep.
                if self.behaviour.recomputes_units and self.job.method != "full":
                    self.settings.kept = []
                if self.behaviour.trainer_scalars:
                    loss, kept = self.divided(loss)
                    backward(self.g, loss)
                    self.losses["last"] = kept
                    del kept
                else:
                    backward(self.g, loss)
                if self.g.flat_gradients is not None:
                    self.g.wait()
                self.release_kept(f"{number}.{micro}")
                del loss
                self.g.free_attributes(self.g.attributes, f"{number}.{micro}")
            if is_own:
                self.batches.drop()
        self.add_up_gradients(number)
        self.metrics = []
        del total
        recording.mark("optimizer_step", number)
        optimizer.step(number)
        if self.behaviour.step_is_function:
            self.settings.cache = []
            self.replace_output([])
        optimizer.zero_grad(number)

    def divided(self, loss: Tensor) -> tuple[Tensor, Tensor]:
        """
        The loss as accelerate takes it to backward, divided by the accumulation steps, and without its graph as the
        Trainer keeps it. It is multiplied in place by the number of processes before (trainer.py, compute_loss).
        """
        g = self.g
        kept, multiplied = alias(loss), alias(loss)
        with g.module("loss"):
            g.record(multiplied, (loss,), [], scale_backward)
            return scale(g, multiplied, "loss over accumulation steps"), kept

    def add_up_gradients(self, number: int) -> None:
        """Of NPT, which no hook of DDP or FSDP sees: all of them in one tensor (train/parallel.py)."""
        if self.job.method != "npt" or self.job.world_size == 1:
            return
        recorded = sum(prod(parameter.shape) for parameter in self.model.trainable)
        num_recorded = len({parameter.layer for parameter in self.model.trainable})
        count = recorded * self.num_converted // num_recorded
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
            self.batches.current = self.batches.new(self.job.max_seq_len)
            if self.job.method == "npt":
                from memplan.tape.npt import evaluate

                evaluate(
                    self.g, self.model, self.batches.current, self.job, self.settings, self.num_converted
                )
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

    def forward(self, label: str) -> Tensor | None:
        g, job = self.g, self.job
        ids, *_, labels = self.batches.current
        self.settings.cache = []
        loss = None
        with whole_root(g):
            if job.method == "npt":
                from memplan.tape.npt import end_to_end_step, local_step, objective, read_metrics

                num_converted = self.num_converted
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
        scaled = self.model.architecture.logits_scaling is not None
        is_own, is_encoder = self.job.loop == "memplan", self.model.architecture.is_encoder
        form = self.job.loss_form(plain_head=head.is_plain)
        if form != "full" and not head.has_only_weight:
            raise JobError(
                f"`loss: {form}` needs an output head that is one linear layer without bias or adapter, not quantised",
                hint="use `--set loss=full`, or keep `lm_head` out of `lora.target_modules` and in `quantization.skip`",
            )
        if form != "full":
            self.settings.input_leaf = None
        if form == "chunked":
            if is_own:
                loss = self.on_head(
                    held[0], lambda x: chunked_loss(g, x, head, labels, softcapped=softcapped)
                )
            else:
                outputs = Outputs()
                count = prod(labels.shape) - self.job.micro_batch_size  # all but the first of each sequence
                returned = [self.on_head(held[0], lambda x: trl_forward(g, x, head, outputs, count))]
                held.clear()
                g.leave_autocast()
                return trl_loss(g, returned, outputs)
            g.leave_autocast()
            return loss
        if form == "fused":
            hidden = held.pop()
            if (
                scaled and not is_own
            ):  # liger_kernel/transformers/monkey_patch.py, apply_liger_kernel_to_granite
                raise JobError(
                    "`loss: fused` is there for Granite in `loop: memplan` only: Liger gives its models no such loss",
                    hint="use `--set loss=full`",
                )
            old = behaviour.liger_before_0_5
            given = scale(g, hidden, "scaled hidden states") if scaled else hidden
            loss = self.on_head(given, lambda x: liger_loss(g, x, head, labels, before_0_5=old))
            if is_own:
                loss = scale(g, loss, "loss over number of tokens")
            g.leave_autocast()
            return loss
        head_begins(g, held[0])
        logits = logits_of(g, self.model, whole_slices(g, held[0], 3 if behaviour.slices_hidden else 0))
        head_ends(g, logits)
        if not behaviour.hold_hidden:
            held.pop()
        if scaled:
            logits = scale(g, logits, "scaled logits")
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
            per_token=behaviour.trainer_scalars and not is_encoder,
            shifts=not is_encoder,
            kernel=triton_cross_entropy if behaviour.triton_loss else cross_entropy,
        )
        if behaviour.float_output:
            held.clear()
            g.leave_autocast()  # accelerate's copy comes after the region it has put around `forward`
            logits = cast(g, logits, "float32")
        if behaviour.clones_output:
            held.clear()
            g.leave_autocast()
            logits = g.new(logits.shape, logits.dtype, "logits that DDP returns")
            loss = scale(g, loss, "loss that DDP returns")
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
        The model's new output takes the place of the one held since the last step: its loss, which keeps its graph with
        the leaves and attributes, its logits and its cache.
        """
        g = self.g
        self.output = output
        attributes, self.held_attributes, g.attributes = self.held_attributes, g.attributes, []
        g.free_attributes(attributes, f"{len(g.stretches)}")
        held, self.held_cache = self.held_cache, self.settings.cache
        held.reverse()
        g.begin(f"cache freed {len(g.stretches)}")
        while held:
            g.enter(held[-1][0])
            held.pop()
        g.enter(None)
