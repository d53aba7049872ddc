"""
The model as the programs run it, part by part: parameters in device memory, linear layers with their adapters, blocks.

Only the blocks asked for are built (repeat.py), each under its own index.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from memplan.job.spec import Job
from memplan.model.architecture import Architecture, Buffer
from memplan.model.families import layout as layout_of
from memplan.model.families.layout import Module
from memplan.tape.behaviour import Behaviour
from memplan.tape.experts import Stack
from memplan.tape.gptq import tensors_of
from memplan.tape.graph import Graph
from memplan.tape.linear_layer import Gptq, Linear
from memplan.tape.packing import (
    make_map,
    pack,
    packed_form,
    packs,
    take_packed,
)  # fmt: skip
from memplan.tape.parts import Block, LinearSpec, linear_spec
from memplan.tape.sharded.accelerate_loading import WholeUnits
from memplan.tape.sharded.cut_late import Uncut
from memplan.tape.sharded.fsdp2_accelerate import shard_of
from memplan.tape.sharded.sharding import Contents, Part, layout, shard_shape
from memplan.tape.sharded.wrapping import ToWrap, add_buffer, add_rotary_tables
from memplan.tape.sharded.zero_groups import zero_stage
from memplan.tape.tensors import ITEMSIZE, Parameter, Storage, Tensor


class Builder:
    """Allocates a model for a job in a graph."""

    def __init__(
        self, g: Graph, job: Job, architecture: Architecture, layers: list[int], behaviour: Behaviour
    ) -> None:
        self.g = g
        self.behaviour, self.layers = behaviour, layers
        self.layout = layout(job, g.device)
        self.contents = Contents(layers)
        self.job, self.architecture = job, architecture
        self.full = job.method == "full"
        self.modules = layout_of(architecture)
        self.block_name = f"{self.modules.block_prefix}.{{layer}}"
        self.base: list[Parameter] = []
        self.originals: dict[str, Tensor] = {}
        self.flat = behaviour.fsdp1 and not self.layout.params_on_host
        """FSDP1: the model is loaded on the host, and comes to the device unit by unit when it is wrapped."""
        self.to_wrap: list[ToWrap] = []
        self.wrapped: dict[int | None, list[Storage]] = {}
        # Ranks that every tensor is cut over by itself: stage 3 of ZeRO; 0 for none.
        self.partition_degree = job.parallel.dp_shard if zero_stage(job) == 3 else 0
        self.is_prepared = job.method == "qlora" and job.quantization.kbit_preparation
        self.cuts_late = self.layout.gathers and job.parallel.strategy == "ZERO_3"  # tape/sharded/cut_late.py
        self.cuts = self.layout.gathers and not self.flat and not self.cuts_late
        """FSDP2: tensors have memory for a part of them before they are filled."""
        self.cuts_whole = self.cuts and behaviour.accelerate_fsdp2
        """As FSDP2, but of a model that has been whole before (tape/sharded/accelerate_loading.py)."""
        self.cuts_packed = self.cuts and not self.cuts_whole
        self.shards_packed = (self.layout.gathers or self.flat) and not (
            behaviour.accelerate_fsdp2 and job.quantization.storage == "uint8"
        )
        """Packed weights are in the units, and not whole on every rank."""
        self.keeps_packed = not self.flat and (not self.shards_packed or self.cuts_late or self.cuts_whole)
        if self.layout.params_on_host and self.shards_packed:
            self.keeps_packed = False
        self.base_dtype = "float32" if self.is_prepared and (self.cuts or self.cuts_late) else job.dtype
        """Of what is not packed: peft prepares a model before FSDP2 cuts it, and a whole one when it is loaded."""
        self.parameters: list[Parameter] = []
        self.to_pack: list[tuple[int | None, str, Linear]] = []
        """4-bit layers that have shards, and are to be packed: block, name, and the layer."""
        self.uncut = Uncut(g, self.layout)
        """What is whole, with `cuts_late`."""
        self.whole_units = WholeUnits(g, on_device=job.has_quantized_base or g.device == "cpu")
        """The same with `cuts_whole`."""
        self.sent: list[tuple[int | None, Part]] = []
        """Every tensor of the model by block, which DDP broadcasts."""
        self.packed_shapes: dict[tuple[int, ...], int | None] = {}
        """Of sharded 4-bit layers, (out, in) and the block of the first one."""
        self.whole: dict[str, list[int]] = {}
        """Tensors that are whole for a moment on their way into shards, with what making them takes."""

    def parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        layer: int | None,
        *,
        dtype: str | None = None,
        trainable: bool | None = None,
        category: str = "weights",
        whole: bool = False,
    ) -> Parameter:
        """
        `whole`: on every rank, whatever is done to the others, as NPT's tensors are (memplan.train.parallel).

        What is gathered has the dtype that is computed with; under accelerate without mixed precision, its own.
        """
        g, cut = self.g, 1 if whole else self.layout.parameters
        made: Tensor | None = None
        unit, stored = layer, dtype or self.base_dtype
        trains = self.full if trainable is None else trainable
        given = (trains and self.behaviour.wrapped_dtype) or stored
        stored = "float32" if self.behaviour.upcasts_flat and trains else stored
        if self.behaviour.accelerate_fsdp2:
            unit, stored = shard_of(self.job, self.architecture, name, layer, stored, trains=trains)
        local = shard_shape(shape, cut)
        if self.partition_degree:  # whole when made, then cut by itself (partition_parameters.py, Init)
            local = (-(-prod(shape) // self.partition_degree),)
            made = g.new(shape, stored, f"{name} before it is cut", "workspace")
        late = self.cuts_late and not whole
        arrives = self.cuts_whole and not whole
        if (self.layout.params_on_host or self.flat or arrives) and not whole and not late:
            storage = Storage([], 0)  # in host memory, not on the tape
        else:
            kept = shape if late else local
            storage = g.storage(prod(kept) * ITEMSIZE[stored], name, stored, kept, category)
        del made
        parameter = Parameter(name, shape, stored, storage, layer, trains)
        if late:
            self.uncut.add(parameter, local, category)
        if self.layout.gathers and not whole:
            keeps_own = self.behaviour.fsdp1 or self.behaviour.accelerate_fsdp2
            parameter.dtype = self.job.autocast or (stored if keeps_own else self.job.dtype)
            self.contents.parts.setdefault(unit, []).append(Part(name, shape, stored, parameter.dtype))
        if self.flat and not whole:
            self.to_wrap.append(ToWrap(layer, Part(name, shape, given, given), parameter))
        if trains and not whole:
            self.contents.trainable.setdefault(unit, []).append(parameter)
        parameter.local_shape = shard_shape(shape, 1 if whole else self.layout.optimizer)
        parameter.stored_dtype = stored
        if arrives and not self.layout.params_on_host:
            loaded = self.job.dtype if self.is_prepared and category == "weights" else stored
            self.whole_units.add(unit, parameter, local, category, dtype=loaded)
        self.parameters.append(parameter)
        self.sent.append((layer, Part(name, shape, stored, stored)))
        if category == "weights":
            self.base.append(parameter)
            if self.layout.gathers and self.job.weights == "random" and not (late or arrives):
                self.whole[name] = [prod(shape) * ITEMSIZE[stored]]
        return parameter

    def linear(self, spec: LinearSpec, layer: int | None, prefix: str) -> Linear:
        job = self.job
        name = f"{prefix}.{spec.path}" if prefix else spec.path
        shape = (spec.out_features, spec.in_features)
        shape = shape[::-1] if spec.transposed else shape
        quantized = packs(job, spec.path)
        if job.has_gptq_base and layer is None:
            quantized = False  # the head, which GPTQ leaves alone
        if quantized and job.has_gptq_base:
            return self.gptq_linear(spec, name, layer)
        linear = Linear(
            name=spec.path,
            in_features=spec.in_features,
            out_features=spec.out_features,
            weight=None,
            dtype=job.dtype,
            conv=spec.transposed,
            transposes=self.architecture.family == "falcon" and layer is not None,
            quantized=quantized,
            has_8_bits=job.has_8bit_base,
            double_quant=job.quantization.double_quant,
            keeps_input=self.behaviour.keeps_4bit_input,
            adds_in_place=self.behaviour.adds_in_place,
        )
        if quantized and self.cuts_whole and job.quantization.double_quant:
            self.whole_units.add_code(layer, name)
        if quantized and self.shards_packed:
            part = self.packed_shard(name, shape, layer)
            if self.cuts_whole and not self.layout.params_on_host:
                self.whole_units.add_packed(layer, linear, part, self.layout.parameters)
        if quantized and self.cuts_late:
            self.uncut.add_packed(layer, linear)
        if quantized and self.cuts_packed:
            self.to_pack.append((layer, name, linear))
        elif quantized:
            count, dtype = packed_form(job, prod(shape), self.behaviour.torch)
            self.sent.append((layer, Part(name, (count,), dtype, dtype)))
            linear.held = (
                take_packed(
                    self.g, job, name, shape, num_rows=spec.out_features, keeps_packed=self.keeps_packed
                )
                if self.architecture.stored
                else pack(
                    self.g, job, name, shape, transposed=spec.transposed,
                    on_device=not self.flat, keeps_packed=self.keeps_packed,
                )
            )  # fmt: skip
        else:
            linear.weight = self.parameter(f"{name}.weight", shape, layer)
        if spec.bias:
            linear.bias = self.parameter(f"{name}.bias", (spec.out_features,), layer)
        return linear

    def gptq_linear(self, spec: LinearSpec, name: str, layer: int | None) -> Linear:
        """
        A layer that GPTQ has quantised: buffers, which are whole on every rank; fms-acceleration makes parameters of
        some, in the dtype that `quantization.storage` names, which FSDP1 then shards.
        """
        software, settings = self.behaviour.gptq, self.job.quantization
        held: list[Tensor] = []
        bias = None
        for item in tensors_of(
            spec.in_features,
            spec.out_features,
            group_size=settings.group_size,
            kernel=software.kernel,
            bias=spec.bias or software.zero_bias,
        ):
            part = Part(f"{name}.{item.name}", item.shape, item.dtype, item.dtype)
            category = "weights" if item.is_packed else "quant_state"
            if self.flat and item.is_packed:
                count = prod(item.shape) * ITEMSIZE[item.dtype] // ITEMSIZE[settings.storage]
                part = Part(part.name, (count,), settings.storage, settings.storage)
                self.contents.parts.setdefault(layer, []).append(part)
            if self.flat:
                self.to_wrap.append(ToWrap(layer, part, is_buffer=not item.is_packed))
                made = Tensor(item.shape, item.dtype, Storage([], 0))
            else:
                made = self.g.new(item.shape, item.dtype, part.name, category)
                held.append(made)
            self.sent.append((layer, part))
            if item.name == "bias":
                bias = made
        gptq = Gptq(
            group_size=settings.group_size,
            kernel=software.kernel,
            masks_in_place=software.masks_in_place,
            bias=bias,
            adds_in_place=software.adds_in_place,
        )
        return Linear(
            name=spec.path, in_features=spec.in_features, out_features=spec.out_features, weight=None,
            dtype=self.job.dtype, quantized=True, gptq=gptq, held=held,
        )  # fmt: skip

    def packed_shard(self, name: str, shape: tuple[int, ...], layer: int | None) -> Part:
        """This rank's part of a packed weight, which has its memory before it is filled."""
        self.packed_shapes.setdefault(shape, layer)
        torch = (2, 13) if self.flat else self.behaviour.torch  # FSDP1 is not memplan's own
        length, dtype = packed_form(self.job, prod(shape), torch)
        part = Part(name, (length,), dtype, dtype)
        self.contents.parts.setdefault(layer, []).append(part)
        if self.flat:
            self.to_wrap.append(ToWrap(layer, part))
        elif not self.layout.params_on_host and not self.cuts_late and not self.cuts_whole:
            local = shard_shape(part.shape, self.layout.parameters)
            self.g.persistent.append(self.g.new(local, dtype, f"{name} packed weight", "weights"))
        return part

    def fill_packed_shards(self) -> None:
        """Every weight is packed whole; a rank copies its part of that, and keeps all constants (train/skeleton.py)."""
        if self.cuts_packed:
            make_map(self.g, self.job)
        self.g.begin("load_packed")
        for layer, name, linear in self.to_pack:
            self.g.enter(layer)
            shape = (linear.out_features, linear.in_features)
            linear.held = pack(self.g, self.job, name, shape, transposed=linear.conv)[1:]
        self.g.enter(None)
        self.to_pack.clear()

    def buffers(self, buffers: Sequence[Buffer]) -> dict[str, Tensor]:
        """By name."""
        return {
            buffer.name: self.g.new(buffer.shape, buffer.dtype or self.job.dtype, buffer.name, "weights")
            for buffer in buffers
        }

    def outer(self, modules: tuple[Module, ...]) -> dict[str, Parameter]:
        """Parameters of modules outside the blocks, by name."""
        return {
            item.name: self.parameter(item.name, item.shape, None)
            for module in modules
            for item in module.parameters("", None)
        }

    def block(self, layer: int, checkpointed: bool) -> Block:
        self.g.enter(layer)
        block = Block(layer, {}, {}, checkpointed=checkpointed)
        to_wrap = self.to_wrap if self.flat else None
        for module in self.modules.block:
            if module.role == "linear":
                block.linears[module.name] = self.linear(linear_spec(module), layer, self.block_name)
            elif module.role in ("router", "experts"):
                (item,) = module.parameters("", layer)
                weight = self.parameter(f"{self.block_name}.{item.name}", item.shape, layer)
                block.stacks[module.name] = Stack(module.name, weight)
            else:
                for item in module.parameters("", layer):
                    block.norms[item.name] = self.parameter(
                        f"{self.block_name}.{item.name}", item.shape, layer
                    )
            for name, shape in module.buffers_behind:
                add_buffer(self.g, f"{self.block_name}.{name}", shape, self.job.dtype, layer, to_wrap)
        if dtype := self.behaviour.rotary_tables:
            add_rotary_tables(self.g, self.block_name, self.architecture, dtype, layer, to_wrap)
        return block

    def keep_rows(self, weight: Parameter | None) -> None:
        """peft's copy of the rows that train, as they are before; it is cast where adapters are."""
        if self.job.trained_tokens and weight is not None:
            shape = (self.job.trained_tokens, weight.shape[-1])
            dtype = "float32" if self.job.lora.dtype == "float32" else weight.stored_dtype
            name = f"{weight.name.removesuffix('.weight')} rows before training"
            self.originals[weight.name] = self.g.new(shape, dtype, name, "weights")
