"""
Predicted slowdowns of changes: the factor on the time of a step, and where each comes from.

They order choices that are otherwise alike and are no claim about a particular machine.
"""

from __future__ import annotations

FULL_CHECKPOINTING_SLOWDOWN = {"full": 4 / 3, "frozen base": 3 / 2}
"""
One more forward pass. Counted in products of matrices, a step is one forward and two in backward for a
trained weight (gradients of its input and of itself): 4/3. A frozen weight has only the first of those two:
3/2.
"""

ACTIVATION_OFFLOAD_SLOWDOWN = 1.1
"""
Copies of block inputs over PCIe. All activations cost 2 % where the copies overlap (pytorch/pytorch pull
request 168316) and 51 % where they do not (174436); block inputs are a small part of them.
"""

MICRO_BATCH_SLOWDOWN = 1.03
"""For each halving: the same arithmetic in twice as many kernels, each less full."""

OPTIMIZER_OFFLOAD_SLOWDOWN = {"full": 1.3, "few trained": 1.05}
"""Gradients and weights cross PCIe once per optimizer step, and the CPU does the step."""

PARAMETER_OFFLOAD_SLOWDOWN = 2.0
"""The weights of every block cross PCIe in forward and again in backward, of every micro batch."""

SHARD_GRADIENTS_SLOWDOWN = 1.05
FULL_SHARD_SLOWDOWN = 1.15
"""
ZeRO moves as much as DDP up to stage 2, and 1.5 times that in stage 3 (Rajbhandari et al. 2020, section 7);
most of it is hidden behind the computation.
"""

FOUR_BIT_SLOWDOWN = 1.4
"""
Every weight is dequantised before each of its products: 39 % measured on a 7B model (S. Raschka, "Practical
Tips for Finetuning LLMs Using LoRA", 2023).
"""
DOUBLE_QUANTISATION_SLOWDOWN = 1.01

EIGHT_BIT_STATES_SLOWDOWN = 1.01
PAGED_STATES_SLOWDOWN = 1.05
PAGED_EIGHT_BIT_STATES_SLOWDOWN = 1.03
"""
States are dequantised and quantised again in the step. Paged ones move by page faults when the card is full,
and in 8 bits there is a quarter as much to move.
"""

LIGER_LOSS_SLOWDOWN = 1.01
"""
Small products for the head: the loss alone took 2.3 times one large product (huggingface/trl pull request
6858).
"""
TRL_CHUNKED_LOSS_SLOWDOWN = 1.02
"""
The logits of each chunk are computed again in backward. Ours computes both gradients in forward and is not
slower.
"""
