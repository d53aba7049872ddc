"""
A model's memory in a dozen lines: smooth, monotone where the lattice says so, and cheap enough to enumerate
all of it. The needs are of the right size for the jobs that the tests use, and no more than that.
"""

from __future__ import annotations

from memplan.errors import JobError
from memplan.gpu.capacity import Capacity
from memplan.job.spec import DTYPE_BYTES, Job, Lora
from memplan.model.architecture import Architecture
from memplan.units import GiB, MiB

QWEN_7B = Architecture(
    name="Qwen2.5-7B",
    family="qwen2",
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    head_dim=128,
    vocab_size=152064,
    max_position_embeddings=32768,
    tie_word_embeddings=False,
    attention_bias=True,
)

JOB = Job(
    model="qwen2.5-7b",
    loss="full",
    micro_batch_size=2,
    gradient_accumulation_steps=8,
    max_seq_len=2048,
    activation_checkpointing="full",
    lora=Lora(rank=128, alpha=256),
)


def card(usable_bytes: int) -> Capacity:
    """A card of which so much is usable."""
    return Capacity("toy", usable_bytes, usable_bytes, 0, "a test")


class ToyEstimator:
    """
    Counts its evaluations. The need lies above the lower bound by what the allocator loses, less with
    expandable segments; jobs whose edits are in `unsupported` raise.
    """

    def __init__(self, *, lost: float = 0.01, unsupported: dict[str, object] | None = None) -> None:
        self.lost = lost
        self.unsupported = unsupported or {}
        self.num_lower_bounds = 0
        self.num_exact = 0

    def lower_bound_bytes(self, job: Job) -> int:
        self.num_lower_bounds += 1
        return self._live_bytes(job)

    def need_bytes(self, job: Job) -> int:
        self.num_exact += 1
        lost = self.lost * (1 if job.allocator.expandable_segments else 2)
        return int(self._live_bytes(job) * (1 + lost))

    def _live_bytes(self, job: Job) -> int:
        for field, value in self.unsupported.items():
            if getattr(job, field) == value:
                raise JobError(f"no formula for {field} {value}")
        blocks, embeddings = 6_500_000_000, 2 * 545_000_000
        itemsize = DTYPE_BYTES[job.dtype]
        ranks = job.parallel.dp_shard if job.parallel.strategy != "NO_SHARD" else 1
        if job.offload.params:
            weights = blocks * itemsize // 14
        elif job.method == "qlora":
            weights = int(blocks * 0.52) + embeddings * itemsize
        else:
            weights = (blocks + embeddings) * itemsize // ranks
        is_full = job.method == "full"
        trained = blocks + embeddings if is_full else 2_500_000 * job.lora.rank
        trained_itemsize = itemsize if is_full else DTYPE_BYTES[job.lora.dtype]
        if not is_full and job.lora.target_modules != "all-linear":
            trained //= 1 + len(job.lora.target_modules) % 4
        gradients = trained * trained_itemsize // ranks
        states = {"adamw": 2, "adamw_8bit": 0.5}.get(job.optimizer, 0) * gradients
        if job.offload.optimizer or job.offload.params:
            states = 0
        adapters = 0 if is_full else trained * trained_itemsize
        tokens = job.micro_batch_size * job.max_seq_len
        block_input = tokens * 3584 * 2
        block = block_input * (17 + 4 * trained_itemsize)
        if job.attention == "eager":
            block += job.micro_batch_size * 28 * job.max_seq_len**2 * 6
        level = job.activation_checkpointing
        kept = {"none": 28 * block, "selective": 14 * (block + block_input), "full": 28 * block_input}[level]
        if job.activation_offload and level == "full":
            kept = 2 * block_input
        logits = {
            "full": tokens * 152064 * (8 if job.loop == "memplan" else 12),
            "chunked": 1024 * 152064 * 8 + block_input,
            "fused": 128 * 152064 * 8 + block_input,
        }[job.loss_form()]
        held = gradients if job.gradient_accumulation_steps > 1 else 0
        recomputed = 0 if level == "none" else block
        temporaries = gradients * 2 if job.optimizer_kernel == "foreach" else 0
        peak = max(kept + recomputed + held, kept + logits + held, gradients + temporaries)
        return int(weights + adapters + states + peak) + 512 * MiB


ENOUGH = 1024 * GiB
