"""torchtitan's checkpointing, sharding and step around the model of `benchmarks.titan_model`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from benchmarks.titan_model import Model, Titan
from memplan.tracing.replaced import replaced

PRODUCT = torch.ops.aten.mm.default
KEPT = {
    PRODUCT,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
}
"""What its selective checkpointing keeps, every second product left out; cuDNN's attention is not among it."""


def build(run: Titan) -> tuple[Model, torch.optim.Optimizer]:
    """The model, each block checkpointed and cut over all ranks, and its AdamW; in a fake process group."""
    with torch.device("meta"):
        model = Model(run)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    shard: Any = partial(fully_shard, mp_policy=policy)
    if run.more_units:
        shard(model.tok_embeddings, reshard_after_forward=run.reshard != "never")
    for index, block in enumerate(model.layers):
        # What comes last is not resharded by default: backward would fetch it again at once.
        is_last = index == run.layers - 1 and not run.more_units
        reshards = run.reshard == "always" or (run.reshard == "default" and not is_last)
        model.layers[index] = shard(_checkpointed(block, run.checkpointing), reshard_after_forward=reshards)
    if run.more_units:
        shard([model.norm, model.output], reshard_after_forward=run.reshard == "always")
    shard(model)
    kernel = {run.optimizer_kernel: True}
    return model, torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, **kernel)


def _checkpointed(block: nn.Module, mode: str) -> nn.Module:
    if mode == "none":
        return block
    contexts = {} if mode == "full" else {"context_fn": _contexts}
    return checkpoint_wrapper(block, preserve_rng_state=False, **contexts)


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(partial(_choose, Counter()))


def _choose(products: Counter[bool], context: Any, operation: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    if operation == PRODUCT:
        products[context.is_recompute] += 1
        keeps = products[context.is_recompute] % 2 == 1
    else:
        keeps = operation in KEPT
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


class Step:
    """One step of its loop, of token ids and labels, both (micro batch, length) int64."""

    def __init__(self, run: Titan, model: Model, optimizer: torch.optim.Optimizer) -> None:
        self.run, self.model, self.optimizer = run, model, optimizer
        self.held: Tensor | None = None

    def __call__(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """The loss, which the loop holds until the next."""
        tokens, labels = batch
        self.optimizer.zero_grad()
        logits = self.model(tokens)
        if self.run.holds_output:
            self.held = logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1))
        del logits
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0, foreach=True)
        self.optimizer.step()
        return loss


@contextmanager
def reduced_apart() -> Iterator[None]:
    """
    FSDP2 before torch 2.5 (pytorch#129721 of 2024-06-27): what a reduce-scatter takes is allocated on its own stream,
    not on the one that computes, and goes when it has been given to it.
    """
    reduce: Any = _fsdp_param_group.foreach_reduce

    def foreach_reduce(params: Any, gradients: Any, group: Any, stream: Any, comm: Any, *rest: Any) -> Any:
        allocate = comm.allocate

        def on_its_stream(*args: Any, **kwargs: Any) -> Tensor:
            with stream:
                out: Tensor = allocate(*args, **kwargs)
                return out

        with replaced([(comm, "allocate", on_its_stream)]):
            taken, *others = reduce(params, gradients, group, stream, comm, *rest)
        return (taken.new_empty(0), *others)

    with replaced([(_fsdp_param_group, "foreach_reduce", foreach_reduce)]):
        yield
