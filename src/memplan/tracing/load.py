"""Loading as the trainer does it: base tensors in module order, 4-bit layers packed one by one, then what trains."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from memplan.job.spec import Job
from memplan.tracing.build import META, MetaModel
from memplan.tracing.places import Place, places_of
from memplan.tracing.recorder import Recorder
from memplan.train.parallel import is_sharded as is_sharded_job
from memplan.train.parallel import local_part
from memplan.train.skeleton import is_sharded


def load(recorder: Recorder, job: Job, meta: MetaModel, *, on_device: bool = False) -> None:
    """
    Record how the model gets its memory, and tell the recorder where its modules are.

    `on_device`: as `from_pretrained` does it with a `device_map` (Behaviour.loads_on_device).
    """
    model = meta.built.model
    places = places_of(model, meta.blocks, meta.selection.layers, meta.built.head)
    recorder.places.tell(places)
    recorder.mark("load", 0)
    if job.loop == "hf_trainer" and is_sharded_job(job) and not job.has_quantized_base:
        return  # in host memory until accelerate shards it (hf_ranks.py)
    if on_device:
        recorder.scratch((_checkpoint_bytes(job, meta, places),), "room for the model's weights")
    adapters = _load_base(recorder, job, model, places, is_stored=meta.is_stored)
    if meta.root is not None:  # shards have their memory, all of them, before any weight comes
        if job.method != "npt":  # whose tensors are made when the rest is there
            _adopt_adapters(recorder, adapters)
            adapters.clear()
        _fill_packed_shards(recorder, model, places)
    elif job.method == "qlora" and job.quantization.kbit_preparation:
        from memplan.train.quantize import prepare_kbit

        with recorder.active():
            prepare_kbit(model)
    _adopt_adapters(recorder, adapters)
    if meta.root is not None and job.method == "qlora":
        _check_packed_shards(recorder, meta.root, places)


def _check_packed_shards(recorder: Recorder, root: nn.Module, places: dict[nn.Module, Place]) -> None:
    """
    The trainer gathers a layer of every shape to see whether it computes what it did when it was packed; the rows that
    it multiplies, of a few KiB, are left out.
    """
    from memplan.train.quantize import checked_units

    with recorder.active():
        for unit, layer in checked_units(root):
            with recorder.places.at(places[layer]):
                unit.unshard()
                unit.reshard()


def _adopt_adapters(recorder: Recorder, adapters: list[tuple[torch.Tensor, str, int | None]]) -> None:
    for parameter, where, layer in adapters:
        recorder.adopt(parameter, "adapters", where, layer)


def _take_packed(recorder: Recorder, module: Any, place: Place) -> None:
    """A weight that the checkpoint stores packed, with its constants."""
    name = _where(place, "weight").replace(".base_layer.", ".")
    module.weight = module.pack_weight(
        torch.empty(module.weight_shape, dtype=module.weight_dtype, device=META)
    )
    recorder.adopt(module.weight, "weights", name, place.layer)
    if module.bits == 8:
        recorder.adopt(module.weight.SCB, "quant_state", f"{name} scales of rows", place.layer)
        return
    for key, tensor in _constants(module.quant_state):
        recorder.adopt(tensor, "quant_state", f"{name} {key}", place.layer)


def _fill_packed_shards(recorder: Recorder, model: nn.Module, places: dict[nn.Module, Place]) -> None:
    for module, is_left in _visits(model, set()):
        if not is_left and _keeps_part(module):
            _pack(recorder, module, places[module])


def _keeps_part(module: Any) -> bool:
    """Whether a layer keeps a part of a packed weight."""
    return hasattr(module, "pack_weight") and is_sharded(module.weight)


def _load_base(
    recorder: Recorder, job: Job, model: nn.Module, places: dict[nn.Module, Place], *, is_stored: bool
) -> list[tuple[torch.Tensor, str, int | None]]:
    """All but adapters, which are returned with what to call them and their block."""
    adapters = []
    for module, is_left in _visits(model, set()):
        place = places[module]
        if is_left:
            for name, buffer in module.named_buffers(recurse=False):
                category = "quant_state" if name in getattr(module, "state_names", ()) else "weights"
                recorder.adopt(buffer, category, _where(place, name), place.layer)
            continue
        if hasattr(module, "pack_weight") and not _keeps_part(module):
            (_take_packed if is_stored else _pack)(recorder, module, place)
        for name, parameter in module.named_parameters(recurse=False):
            held = local_part(parameter)
            if recorder.host is not None and is_sharded(parameter):  # all but what an NPT block adds
                recorder.host.add(held)
            if parameter.requires_grad and job.method != "full":
                adapters.append((held, _where(place, name), place.layer))
            else:
                recorder.adopt(held, "weights", _where(place, name), place.layer)
    return adapters


def _visits(module: nn.Module, seen: set[nn.Module]) -> Iterator[tuple[nn.Module, bool]]:
    """
    Modules as they are entered, in the order of a checkpoint's parameters, and as they are left (True), in the order
    in which transformers initialises them, which is when buffers that no checkpoint holds are made.
    """
    if module in seen:
        return
    seen.add(module)
    yield module, False
    for child in module.children():
        yield from _visits(child, seen)
    yield module, True


def _checkpoint_bytes(job: Job, meta: MetaModel, places: dict[nn.Module, Place]) -> int:
    """Bytes of all weights as `from_pretrained` counts them: so many bits per element of one that is packed."""
    stands_for = meta.multiplicity()
    total = 0
    counted: set[int] = set()
    for module, place in places.items():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in counted or (parameter.requires_grad and job.method != "full"):
                continue
            counted.add(id(parameter))
            num_bytes = parameter.numel() * parameter.element_size()
            if name == "weight" and hasattr(module, "pack_weight"):
                num_bytes = module.in_features * module.out_features * module.bits // 8
            total += num_bytes * (1 if place.layer is None else stands_for.get(place.layer, 1))
    return total


def _where(place: Place, name: str) -> str:
    return f"{place.path}.{name}" if place.path else name


def _pack(recorder: Recorder, module: Any, place: Place) -> None:
    """
    The weight arrives in 16 bits and is there until its packed form is. Of that a rank that shards copies its part.
    """
    name = _where(place, "weight").replace(".base_layer.", ".")
    weight = torch.empty(module.weight_shape, dtype=module.weight_dtype, device=META)
    recorder.adopt(weight, "workspace", f"{name} before packing", place.layer)
    with recorder.active(), recorder.places.at(place):
        packed = module.pack_weight(weight)
    del weight
    if not is_sharded(module.weight):
        module.weight = packed
        recorder.name(packed, "weights", name)
    if module.bits == 8:
        recorder.name(packed.SCB, "quant_state", f"{name} scales of rows")
        return
    for key, tensor in _constants(module.quant_state):
        recorder.name(tensor, "quant_state", f"{name} {key}")


def _constants(state: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The constants of a packed weight, and those of the constants."""
    for key in ("absmax", "code", "offset"):
        tensor = getattr(state, key, None)
        if isinstance(tensor, torch.Tensor) and not isinstance(tensor, nn.Parameter):
            yield key, tensor
    if state.state2 is not None:
        for key, tensor in _constants(state.state2):
            yield f"nested {key}", tensor
