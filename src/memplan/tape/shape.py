"""
The shape writer: a job and an architecture in, the tape of loading and of training steps out, without torch.

The programs run over a few blocks per kind of block; repeat.py writes the rest.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from memplan.errors import UnknownModel
from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.tape.behaviour import Behaviour as Behaviour
from memplan.tape.engine import Graph, Tensor
from memplan.tape.kernels import liger_loss, triton_cross_entropy
from memplan.tape.linear import linear
from memplan.tape.loss import chunked_loss, cross_entropy, full_loss
from memplan.tape.model import Builder, Model
from memplan.tape.ops import cast
from memplan.tape.optimizer import OptimizerProgram
from memplan.tape.programs import Settings, decoder

FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")


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
    device: str = "cuda",
    behaviour: Behaviour | None = None,
) -> Recording:
    """
    Run the job's program over these blocks of the model: loading, and the steps `first_step` to `num_steps`. A later
    first step finds the optimizer's states in place.
    """
    if architecture.family not in FAMILIES:
        raise UnknownModel(
            f"the shape writer has no program for `{architecture.family}` models (`{architecture.name}`)",
            hint=f"families with a program: {', '.join(FAMILIES)}",
        )
    behaviour = behaviour or Behaviour.for_job(job)
    if job.method == "npt":
        # Converted models train in eval mode: a teacher with dropout is a noisy one.
        architecture = replace(
            architecture, attention_dropout=0.0, residual_dropout=0.0, embedding_dropout=0.0
        )
    g = Graph(device)
    if device == "cuda":
        g.workspace_bytes = behaviour.cublas_workspace_bytes
    g.autocast = job.autocast
    recording = Recording(g, layers=tuple(layers))
    recording.mark("load", 0)
    model = Builder(g, job, architecture, layers).build(
        npt_layers(job, architecture), checkpointed_layers(job, architecture)
    )
    if g.units is not None:
        g.units.flat = behaviour.fsdp1
    recording.num_trainable = len(model.trainable)
    optimizer = OptimizerProgram(g, job, model.trainable, _num_trainable(model, architecture, layers))
    loop = Loop(g, job, model, behaviour, recording)
    if first_step > 1:
        optimizer.create_states()
    for step in range(first_step, num_steps + 1):
        loop.step(step, optimizer)
    recording.mark("end", num_steps)
    recording.events = g.events[:]  # what is freed from here on, when the model goes, is not part of the tape
    return recording


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


def checkpointed_layers(job: Job, architecture: Architecture) -> frozenset[int]:
    """Blocks that are recomputed in backward: all, every second one, or none."""
    every = {"none": None, "selective": 2, "full": 1}[job.activation_checkpointing]
    if every is None:
        return frozenset()
    return frozenset(range(every - 1, architecture.num_hidden_layers, every))


class Loop:
    """The training loop: what it holds, and until when."""

    def __init__(self, g: Graph, job: Job, model: Model, behaviour: Behaviour, recording: Recording) -> None:
        self.g = g
        self.job = job
        self.model = model
        self.behaviour = behaviour
        self.recording = recording
        self.settings = Settings(job.attention, behaviour, offload_inputs=job.activation_offload)
        self.batch: tuple[Tensor, Tensor] | None = None
        self.output: Tensor | None = None
        self.held_cache: list[tuple[int, Tensor]] = []

    def step(self, number: int, optimizer: OptimizerProgram) -> None:
        """One optimizer step; from the third micro batch on nothing changes, so no more are written."""
        recording = self.recording
        for micro in range(1, min(self.job.gradient_accumulation_steps, 3) + 1):
            recording.mark("forward", number)
            length = self.behaviour.first_length if number == 1 else None
            loss = self.forward(f"{number}.{micro}", length or self.job.max_seq_len)
            if loss is not None:
                self.g.leave_autocast()  # casts of weights live until autocast ends; the graph keeps its own
                recording.mark("backward", number)
                self.g.begin(f"backward {number}.{micro}")
                if self.behaviour.fsdp1 and self.job.method != "full":
                    self.settings.kept = []
                self.g.backward(loss)
                self.release_kept(f"{number}.{micro}")
                del loss
        recording.mark("optimizer_step", number)
        optimizer.step(number)
        if self.behaviour.step_is_function:
            self.settings.cache = []
            self.replace_output(None)
        optimizer.zero_grad(number)

    def release_kept(self, label: str) -> None:
        """What FSDP1's hooks kept goes, block by block."""
        kept = self.settings.kept or []
        self.settings.kept = None
        self.g.begin(f"inputs freed {label}")
        while kept:
            self.g.enter(kept[-1][0].layer)
            kept.pop()
        self.g.enter(None)

    def forward(self, label: str, length: int) -> Tensor | None:
        g, job = self.g, self.job
        g.begin(f"forward {label}")
        shape = (job.micro_batch_size, length)
        ids = g.new(shape, "int64", "input ids", "inputs")
        labels = g.new(shape, "int64", "labels", "inputs")
        self.batch = (ids, labels)
        self.settings.cache = []
        if job.method == "npt":
            from memplan.tape.npt import local_step

            local_step(g, self.model, ids, job, self.settings)
            g.leave_autocast()
            return None
        hidden = [decoder(g, self.model, ids, self.settings)]
        g.category = "logits_loss"
        with g.module("loss"):
            loss = self.loss(hidden, labels)
        g.category = "activations"
        return loss

    def loss(self, held: list[Tensor], labels: Tensor) -> Tensor:
        """`held` is the only reference to the hidden states, so that they can go as early as the loop lets them."""
        g, behaviour, head = self.g, self.behaviour, self.model.head
        if self.job.loss == "chunked":
            return chunked_loss(g, held.pop(), head, labels)
        if self.job.loss == "fused":
            hidden = held.pop()
            return liger_loss(g, hidden, head, labels, before_0_5=behaviour.liger_before_0_5)
        logits = linear(g, held[0], head)
        if behaviour.float_logits:
            logits = cast(g, logits, "float32")
        if not behaviour.hold_hidden:
            held.pop()
        loss = full_loss(
            g,
            logits,
            labels,
            upcast=behaviour.upcast_logits,
            shift_logits=behaviour.shift_logits,
            kernel=triton_cross_entropy if behaviour.triton_loss else cross_entropy,
        )
        if behaviour.float_output:
            held.clear()
            logits = cast(g, logits, "float32")
        if behaviour.hold_logits:
            self.replace_output(logits)
        return loss

    def replace_output(self, logits: Tensor | None) -> None:
        """The model's new output takes the place of the one held since the last step: its logits, its cache."""
        g = self.g
        self.output = logits
        held, self.held_cache = self.held_cache, self.settings.cache
        held.reverse()
        g.begin(f"cache freed {len(g.stretches)}")
        while held:
            g.enter(held[-1][0])
            held.pop()
        g.enter(None)
