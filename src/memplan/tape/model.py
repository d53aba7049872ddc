"""
The model as the programs run it: parameters in device memory, linear layers with their adapters, blocks.

`build` allocates in the order of loading: the base weights in module order, 4-bit layers packed one by one, then what
the method adds. Only the blocks asked for are built (repeat.py), each under its own index.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod

from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.model.tensors import linear_modules, parameters
from memplan.tape.engine import ITEMSIZE, Graph, Parameter, Storage, Tensor
from memplan.tape.linear import Adapter, Linear, packed_sizes
from memplan.tape.sharding import Part, Units, layout, shard_shape


@dataclass
class NptModulator:
    """Parameters of the weight delta of one converted block: A (d, r) and B (r, f)."""

    a: Parameter
    b: Parameter


@dataclass
class Block:
    """One transformer block."""

    layer: int
    linears: dict[str, Linear]
    norms: dict[str, Parameter]
    checkpointed: bool = False
    npt: NptModulator | None = None


@dataclass
class Model:
    """Everything that stays in memory between steps, and the parameters that train, in the optimizer's order."""

    architecture: Architecture
    blocks: list[Block]
    embedding: Parameter
    positions: Parameter | None
    final_norm: dict[str, Parameter]
    head: Linear
    buffers: dict[str, Tensor]
    trainable: list[Parameter] = field(default_factory=list)
    kept: list[Storage] = field(default_factory=list)


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer by its path in the block (or, for the head, in the model)."""

    path: str
    in_features: int
    out_features: int
    bias: bool
    transposed: bool = False


def block_linears(architecture: Architecture) -> list[LinearSpec]:
    """The linear layers of one block, in module order."""
    one, prefix = _one_block(architecture)
    return [
        LinearSpec(
            module.name.removeprefix(prefix),
            module.in_features,
            module.out_features,
            module.bias,
            module.transposed,
        )
        for module in linear_modules(one)
        if module.layer == 0
    ]


def block_norms(architecture: Architecture) -> list[tuple[str, int]]:
    """Norm parameters of one block and their sizes, in module order."""
    one, prefix = _one_block(architecture)
    return [
        (parameter.name.removeprefix(prefix), parameter.shape[0])
        for parameter in parameters(one)
        if parameter.layer == 0 and parameter.role == "norm"
    ]


def _one_block(architecture: Architecture) -> tuple[Architecture, str]:
    """The model cut to one block, and the path of that block."""
    prefix = "transformer.h.0." if architecture.family == "gpt2" else "model.layers.0."
    return replace(architecture, num_hidden_layers=1, layer_types=()), prefix


def targets(job: Job, path: str) -> bool:
    """Whether a linear layer of a block gets an adapter: by the last part of its path, as peft matches names."""
    wanted = job.lora.target_modules
    if job.method not in ("lora", "qlora"):
        return False
    if wanted == "all-linear":
        return True
    names = (wanted,) if isinstance(wanted, str) else wanted
    return any(path == name or path.endswith(f".{name}") for name in names)


class Builder:
    """Allocates a model for a job in a graph."""

    def __init__(self, g: Graph, job: Job, architecture: Architecture, layers: list[int]) -> None:
        self.g = g
        self.layers = layers
        self.layout = layout(job)
        self.units = Units(g, self.layout, layers)
        self.job = job
        self.architecture = architecture
        self.full = job.method == "full"
        self.quantized = job.method == "qlora"
        self.gpt2 = architecture.family == "gpt2"
        self.prefix = "transformer" if self.gpt2 else "model"
        self.upcast: list[Parameter] = []

    def parameter(
        self,
        name: str,
        shape: tuple[int, ...],
        layer: int | None,
        *,
        dtype: str | None = None,
        trainable: bool | None = None,
        category: str = "weights",
    ) -> Parameter:
        g, cut = self.g, self.layout.parameters
        stored = dtype or self.job.dtype
        trains = self.full if trainable is None else trainable
        local = shard_shape(shape, cut)
        if self.layout.params_on_host:
            storage = Storage([], 0)  # in host memory, not on the tape
        else:
            held = g.new(local, stored, name, category)
            assert held.storage is not None
            storage = held.storage
        parameter = Parameter(name, shape, stored, storage, layer, trains)
        if self.layout.gathers:
            # MixedPrecisionPolicy: what is gathered has the dtype that is computed with.
            parameter.dtype = self.job.autocast or self.job.dtype
            self.units.parts.setdefault(layer, []).append(Part(name, shape, parameter.dtype))
        if trains:
            self.units.trainable.setdefault(layer, []).append(parameter)
        parameter.local_shape = shard_shape(shape, self.layout.optimizer)
        parameter.stored_dtype = stored
        if category == "weights":
            self.upcast.append(parameter)
        return parameter

    def linear(self, spec: LinearSpec, layer: int | None, prefix: str) -> Linear:
        job = self.job
        name = f"{prefix}.{spec.path}" if prefix else spec.path
        shape = (
            (spec.in_features, spec.out_features)
            if spec.transposed
            else (spec.out_features, spec.in_features)
        )
        skipped = any(spec.path == skip or spec.path.endswith(f".{skip}") for skip in job.quantization.skip)
        quantized = self.quantized and not skipped and not spec.transposed
        linear = Linear(
            name=spec.path,
            in_features=spec.in_features,
            out_features=spec.out_features,
            weight=None,
            dtype=job.dtype,
            quantized=quantized,
            double_quant=job.quantization.double_quant,
        )
        if quantized:
            linear.held = self.pack(name, spec, layer)
        else:
            linear.weight = self.parameter(f"{name}.weight", shape, layer)
        if spec.bias:
            linear.bias = self.parameter(f"{name}.bias", (spec.out_features,), layer)
        return linear

    def pack(self, name: str, spec: LinearSpec, layer: int | None) -> list[Tensor]:
        """Quantise on the device: the 16-bit weight is there until its packed form is."""
        g = self.g
        weight = g.new(
            (spec.out_features, spec.in_features),
            self.job.dtype,
            f"{name}.weight before packing",
            "workspace",
        )
        held = []
        sizes = packed_sizes(spec.in_features * spec.out_features, self.job.quantization.double_quant)
        for part, num_bytes in sizes.items():
            packed = part == "packed weight"
            if packed and self.layout.gathers:
                self.units.parts.setdefault(layer, []).append(Part(name, (num_bytes,), "uint8"))
                num_bytes = -(-num_bytes // self.layout.parameters)
                if self.layout.params_on_host:
                    continue
            held.append(
                g.new((num_bytes,), "uint8", f"{name} {part}", "weights" if packed else "quant_state")
            )
        del weight
        return held

    def build(self, npt_layers: frozenset[int], checkpointed: frozenset[int]) -> Model:
        g, architecture, job, layers = self.g, self.architecture, self.job, self.layers
        d = architecture.hidden_size
        g.begin("load")
        embedding_name = "wte" if self.gpt2 else "embed_tokens"
        embedding = self.parameter(
            f"{self.prefix}.{embedding_name}.weight", (architecture.vocab_size, d), None
        )
        positions = None
        if self.gpt2:
            positions = self.parameter(
                "transformer.wpe.weight", (architecture.max_position_embeddings, d), None
            )
        blocks = []
        specs, norm_sizes = block_linears(architecture), block_norms(architecture)
        for layer in layers:
            g.enter(layer)
            prefix = f"{self.prefix}.{'h' if self.gpt2 else 'layers'}.{{layer}}"
            linears = {spec.path: self.linear(spec, layer, prefix) for spec in specs}
            norms = {name: self.parameter(f"{prefix}.{name}", (size,), layer) for name, size in norm_sizes}
            blocks.append(Block(layer, linears, norms, layer in checkpointed))
        g.begin("load_rest")
        norm_name = "transformer.ln_f" if self.gpt2 else "model.norm"
        final_norm = {"weight": self.parameter(f"{norm_name}.weight", (d,), None)}
        if self.gpt2:
            final_norm["bias"] = self.parameter(f"{norm_name}.bias", (d,), None)
        buffers = {}
        if not self.gpt2:
            for name in ("inv_freq", "original_inv_freq"):
                buffers[name] = g.new(
                    (architecture.head_dim // 2,), "float32", f"model.rotary_emb.{name}", "weights"
                )
        head = Linear("lm_head", d, architecture.vocab_size, embedding, dtype=job.dtype)
        if not architecture.tie_word_embeddings:
            head = self.linear(LinearSpec("lm_head", d, architecture.vocab_size, False), None, "")
        model = Model(architecture, blocks, embedding, positions, final_norm, head, buffers)
        self.prepare_kbit(model)
        self.attach_adapters(model)
        self.attach_npt(model, npt_layers)
        if self.full:
            model.trainable = _in_module_order(model)
        if self.layout.gathers or self.layout.gradients > 1:
            g.units = self.units
        self.make_buckets(model)
        return model

    def make_buckets(self, model: Model) -> None:
        """DDP's buckets: as many bytes as the gradients; here one per block, there 25 MiB each."""
        if self.layout.replicas == 1:
            return
        g = self.g
        g.begin("buckets")
        for layer in [None, *self.layers]:
            g.enter(layer)
            sizes = [
                prod(item.shape) * ITEMSIZE[item.dtype] for item in model.trainable if item.layer == layer
            ]
            if sizes:
                model.kept.append(g.storage(sum(sizes), "gradient bucket", category="comm"))
        g.enter(None)

    def prepare_kbit(self, model: Model) -> None:
        """peft's prepare_model_for_kbit_training: every parameter that is not packed becomes float32, one by one."""
        if not (self.quantized and self.job.quantization.kbit_preparation):
            return
        g = self.g
        g.begin("kbit")
        for parameter in self.upcast:
            if parameter.dtype != "float32":
                g.enter(parameter.layer)
                parameter.storage = g.new(parameter.shape, "float32", parameter.name, "weights").storage
                parameter.dtype = "float32"

    def attach_adapters(self, model: Model) -> None:
        job, g = self.job, self.g
        if job.method not in ("lora", "qlora"):
            return
        g.begin("load_adapters")
        prefix = f"{self.prefix}.{'h' if self.gpt2 else 'layers'}"
        for block in model.blocks:
            g.enter(block.layer)
            for path, linear in block.linears.items():
                if targets(job, path):
                    self.adapt(linear, f"{prefix}.{{layer}}.{path}", block.layer, model)
        g.enter(None)
        if job.lora.target_modules != "all-linear" and targets(job, "lm_head"):
            self.adapt(model.head, "lm_head", None, model)

    def adapt(self, linear: Linear, name: str, layer: int | None, model: Model) -> None:
        rank, dtype = self.job.lora.rank, self.job.lora.dtype

        def matrix(part: str, shape: tuple[int, int]) -> Parameter:
            full_name = f"{name}.{part}.default.weight"
            return self.parameter(full_name, shape, layer, dtype=dtype, trainable=True, category="adapters")

        a = matrix("lora_A", (rank, linear.in_features))
        b = matrix("lora_B", (linear.out_features, rank))
        linear.adapter = Adapter(a, b, self.job.lora.dropout)
        model.trainable += [a, b]

    def attach_npt(self, model: Model, npt_layers: frozenset[int]) -> None:
        """Modulators are float32 whatever the base is: they are what trains."""
        if self.job.method != "npt":
            return
        g, rank = self.g, self.job.npt.rank
        g.begin("load_adapters")
        for block in model.blocks:
            if block.layer in npt_layers:
                g.enter(block.layer)
                name = f"{self.prefix}.{'h' if self.gpt2 else 'layers'}.{{layer}}.np"
                d, f = self.architecture.hidden_size, self.architecture.intermediate_size
                a = self.parameter(
                    f"{name}.A", (d, rank), block.layer, dtype="float32", trainable=True, category="adapters"
                )
                b = self.parameter(
                    f"{name}.B", (rank, f), block.layer, dtype="float32", trainable=True, category="adapters"
                )
                block.npt = NptModulator(a, b)
                model.trainable += [a, b]
        g.enter(None)


def _in_module_order(model: Model) -> list[Parameter]:
    parameters = [model.embedding]
    if model.positions is not None:
        parameters.append(model.positions)
    for block in model.blocks:
        for linear in block.linears.values():
            parameters += [tensor for tensor in (linear.weight, linear.bias) if tensor is not None]
        parameters += block.norms.values()
    parameters += model.final_norm.values()
    if model.head.weight is not model.embedding and model.head.weight is not None:
        parameters.append(model.head.weight)
    return parameters
