"""
A model without memory, whose tensors get theirs one by one: drawn, or read from a checkpoint, packed to 4 bits or
cut to a shard on the way. At no time is more of it in memory than what stays and the tensor at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from memplan.errors import ModelError
from memplan.train.seeds import derive_seed


@dataclass
class Slot:
    """One tensor of a model; tied weights share theirs."""

    shape: torch.Size
    """In a checkpoint, whatever it is stored as here."""
    dtype: torch.dtype
    """Before it is packed."""
    places: list[tuple[nn.Module, str]] = field(default_factory=list)
    """Every module and attribute that refers to it."""
    is_placed: bool = False


class Skeleton:
    """
    A transformers model on the meta device, by the names that its checkpoints know its tensors by.

    Make it before adapters wrap the model's layers and before FSDP shards them: it remembers modules, which both
    leave in place, and not names, which adapters change.

    Args:
        model: a `PreTrainedModel` on the meta device; 4-bit layers as `quantize.replace_linears` leaves them.
        device: where its tensors get their memory.
        grows: embeddings and head may have fewer rows in the checkpoint.
        watch: rows of both to keep a copy of.
    """

    def __init__(
        self, model: Any, device: torch.device, *, grows: bool = False, watch: Sequence[int] = ()
    ) -> None:
        self.model = model
        self.device = device
        self.watched: dict[nn.Module, Tensor] = {}
        """Of the embeddings and the head, once they are placed, a copy of the rows that were asked for."""
        self._watch = list(watch)
        self._vocabulary = [model.get_input_embeddings(), model.get_output_embeddings()]
        self._grows = grows
        self.slots: dict[str, Slot] = {}
        """By transformers' names; a tied weight under each of its names."""
        self._slot_at: dict[tuple[int, str], Slot] = {}
        self._initialisers = list(_initialisers(model))
        self._collect_slots()

    def place(self, name: str, tensor: Tensor, *, owned: bool = False) -> None:
        """
        Give a tensor its memory and its values. What has them already, tied to another one, is left as it is.

        Args:
            name: transformers' name of it.
            tensor: all of it, in its shape in a checkpoint; any device and dtype.
            owned: it may become the model's own where device and dtype are right.

        Raises:
            ModelError: it has another shape.
        """
        slot = self.slots[name]
        if self._grows and self._is_vocabulary(slot) and tensor.shape[0] < slot.shape[0]:
            tensor, owned = add_mean_rows(tensor, slot.shape[0]), True
        if tensor.shape != slot.shape:
            raise ModelError(
                f"the weights do not fit the model's config: `{name}` is {tuple(tensor.shape)}, "
                f"not {tuple(slot.shape)}",
                hint="weights and config.json must be of the same model",
            )
        if not slot.is_placed:
            self._fill(slot, tensor, owned=owned)

    def _is_vocabulary(self, slot: Slot) -> bool:
        """Whether a tensor has a row for every token."""
        return any(module is known for module, _ in slot.places for known in self._vocabulary)

    def draw(self, seed: int) -> None:
        """
        Random values by transformers' own rules, drawn on the device, whole. Those of a module depend on its name and
        the seed alone, so that every rank and every way to store them gets the same; but for packed layers of Falcon,
        which its rules draw once, and twice where they are not packed.
        """
        self._initialise(seed)

    def finish(self) -> None:
        """
        Fill the buffers that no checkpoint holds, when all else is placed.

        Raises:
            ModelError: a parameter was not placed.
        """
        missing = [
            name
            for name, slot in self.slots.items()
            if not slot.is_placed and slot.places[0][1] in slot.places[0][0]._parameters
        ]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ModelError(
                f"the weights lack `{missing[0]}`{more}",
                hint="weights and config.json must be of the same model",
            )
        self._initialise(None)

    def _collect_slots(self) -> None:
        by_tensor: dict[int, Slot] = {}
        names = {id(tensor): name for name, tensor in self.model.state_dict(keep_vars=True).items()}
        for module in self.model.modules():
            for attribute, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if id(tensor) not in names:
                    continue
                shape, dtype = tensor.shape, tensor.dtype
                if attribute == "weight" and hasattr(module, "pack_weight"):
                    shape, dtype = module.weight_shape, module.weight_dtype
                slot = by_tensor.setdefault(id(tensor), Slot(shape, dtype))
                slot.places.append((module, attribute))
                self._slot_at[id(module), attribute] = slot
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            self.slots[name] = by_tensor[id(tensor)]

    def _initialise(self, seed: int | None) -> None:
        """
        Run the model's initialisers over what has no values yet: buffers, and with a seed parameters.

        An initialiser writes in place, and only into tensors that are not marked as initialised, so that each module is
        given whole tensors for as long as its initialiser runs.
        """
        from transformers import initialization

        with torch.no_grad(), initialization.guard_torch_init_functions():
            for path, module, initialise in self._initialisers:
                drawn = {}
                for attribute in module._parameters if seed is not None else ():
                    slot = self._slot_at.get((id(module), attribute))
                    if slot is not None and not slot.is_placed:
                        drawn[attribute] = nn.Parameter(
                            torch.empty(slot.shape, dtype=slot.dtype, device=self.device), requires_grad=False
                        )
                has_buffers = self._make_buffers(module)
                if not drawn and not has_buffers:
                    continue
                kept = {attribute: module._parameters[attribute] for attribute in drawn}
                module._parameters.update(drawn)
                if drawn:
                    torch.manual_seed(derive_seed(seed, "weights", path))
                initialise(module)
                module._parameters.update(kept)
                for attribute in list(drawn):
                    # Nothing else refers to it, so that it is gone before the next one is drawn.
                    self._fill(
                        self._slot_at[id(module), attribute], drawn.pop(attribute).detach(), owned=True
                    )

    def _make_buffers(self, module: nn.Module) -> bool:
        """Memory for the buffers of a module that have no values yet; whether there are any."""
        found = False
        for attribute, buffer in module._buffers.items():
            slot = self._slot_at.get((id(module), attribute))
            if buffer is None or (slot is not None and slot.is_placed):
                continue
            module._buffers[attribute] = torch.empty_like(buffer, device=self.device)
            if slot is not None:
                slot.is_placed = True
            found = True
        return found

    def _fill(self, slot: Slot, tensor: Tensor, *, owned: bool) -> None:
        module, attribute = slot.places[0]
        current = getattr(module, attribute)
        packs = attribute == "weight" and hasattr(module, "pack_weight")
        if self._watch and attribute == "weight" and self._is_vocabulary(slot):
            rows = tensor[self._watch].to(self.device, slot.dtype)
            self.watched.update({owner: rows for owner, _ in slot.places})
        value: Tensor
        if is_sharded(current) and not packs:
            copy_shard(current, tensor)  # of a mapped file only this part is read
            value = current
        else:
            value = tensor.to(self.device, slot.dtype, copy=not owned)
            del tensor
            if packs:
                value = module.pack_weight(value)
            if is_sharded(current):
                copy_shard(current, value)
                value = current
            elif isinstance(current, nn.Parameter) and not isinstance(value, nn.Parameter):
                value = nn.Parameter(value, requires_grad=current.requires_grad)
        value._is_hf_initialized = True
        for owner, name in slot.places:
            (owner._parameters if name in owner._parameters else owner._buffers)[name] = value
        slot.is_placed = True


def add_mean_rows(tensor: Tensor, num_rows: int) -> Tensor:
    """
    A copy of embeddings (V, d), or a bias (V,), with rows added up to `num_rows`, each the mean of those there are.

    transformers' `resize_token_embeddings` draws them around the same mean, with 1e-9 of the rows' covariance.
    """
    mean = tensor.mean(0, dtype=torch.float32).to(tensor.dtype)
    grown = tensor.new_empty((num_rows, *tensor.shape[1:]))
    grown[: tensor.shape[0]] = tensor
    grown[tensor.shape[0] :] = mean
    return grown


def _initialisers(model: Any) -> Iterator[tuple[str, nn.Module, Callable[[nn.Module], None]]]:
    """
    Paths, modules and what initialises them, children first: models inside a model bring their own rules, as in
    transformers' `PreTrainedModel.initialize_weights`.
    """

    def walk(path: str, module: Any, initialise: Callable[[nn.Module], None]) -> Iterator[Any]:
        for name, child in module.named_children():
            rule = getattr(child, "_init_weights", initialise)
            yield from walk(f"{path}.{name}" if path else name, child, rule)
        yield path, module, initialise

    yield from walk("", model, model._init_weights)


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    return hasattr(tensor, "to_local")


def copy_shard(sharded: Any, whole: Tensor) -> None:
    """Copy this rank's part of `whole` into a DTensor; every rank has the whole, so nothing is sent."""
    with torch.no_grad():
        sharded.to_local().copy_(whole[shard_slices(sharded)])


def shard_slices(sharded: Any) -> tuple[slice, ...]:
    """
    Where this rank's part of a DTensor begins and ends in every dimension: equal parts, the last ones shorter or empty.
    """
    ranges = [(0, size) for size in sharded.shape]
    mesh = sharded.device_mesh
    for mesh_dim, (placement, position) in enumerate(zip(sharded.placements, mesh.get_coordinate())):
        if placement.is_shard():
            begin, end = ranges[placement.dim]
            part = -(-(end - begin) // mesh.size(mesh_dim))
            first = min(begin + part * position, end)
            ranges[placement.dim] = first, min(first + part, end)
    return tuple(slice(*bounds) for bounds in ranges)
