"""What a method adds to a model that is loaded: rows that train, adapters, NPT's modulators."""

from __future__ import annotations

from memplan.model.families.layout import Module
from memplan.npt.layers import check_target, modulator_shapes
from memplan.tape.builder import Builder
from memplan.tape.experts import Stack, StackAdapter
from memplan.tape.linear_layer import Adapter, Linear
from memplan.tape.parts import Model, NptModulator
from memplan.tape.targets import copies, stack_adapter_shapes, targets, targets_stack
from memplan.tape.tensors import Parameter
from memplan.tape.token_rows import TokenRows


def _rows(builder: Builder, weight: Parameter, model: Model) -> TokenRows:
    """The rows of a matrix that train."""
    shape = (builder.job.trained_tokens, weight.shape[-1])
    name = weight.name.removesuffix(".weight")
    trained = builder.parameter(
        f"{name} trained rows", shape, None,
        dtype=builder.job.lora.dtype, trainable=True, category="adapters",
    )  # fmt: skip
    model.trainable.append(trained)
    return TokenRows(weight, trained, builder.originals[weight.name])


def _copied(builder: Builder, module: str, weight: Parameter, model: Model) -> Parameter:
    """
    A parameter of a module that trains in place of a frozen one, which stays: in its dtype if the job does not say
    otherwise, since peft casts layers of its tuners alone (tuners_utils.py, cast_adapter_dtype).
    """
    kind = weight.name.rpartition(".")[2]
    copied = builder.parameter(
        f"{module}.modules_to_save.default.{kind}", weight.shape, None,
        dtype=builder.job.lora.modules_to_save_dtype or weight.stored_dtype, trainable=True, category="adapters",
    )  # fmt: skip
    model.trainable.append(copied)
    return copied


def _copy_head(builder: Builder, model: Model) -> None:
    """Also where it is tied to the embeddings: a copy of its own, unlike theirs (utils/other.py, update)."""
    head = model.head
    assert head.weight is not None
    head.weight = _copied(builder, head.name, head.weight, model)
    if head.bias is not None:
        head.bias = _copied(builder, head.name, head.bias, model)
    head.is_copy = True


def attach_adapters(builder: Builder, model: Model) -> None:
    job, g = builder.job, builder.g
    if job.method not in ("lora", "qlora"):
        return
    g.begin("load_adapters")
    if job.trained_tokens:
        model.rows = model.head.rows = _rows(builder, model.embedding, model)
    if copies(job, builder.modules.before[0].name):
        model.embedding = _copied(builder, builder.modules.before[0].name, model.embedding, model)
    for block in model.blocks:
        g.enter(block.layer)
        for path, linear in block.linears.items():
            if targets(job, f"{builder.modules.block_prefix}.{block.layer}.{path}"):
                _adapt(builder, linear, f"{builder.block_name}.{path}", block.layer, model)
        for module in builder.modules.block:
            if module.name in block.stacks and targets_stack(job, module):
                _adapt_stack(builder, module, block.stacks[module.name], block.layer, model)
    g.enter(None)
    for path, linear in model.linears.items():
        if targets(job, path):
            _adapt(builder, linear, path, None, model)
    if job.trained_tokens and not builder.architecture.tie_word_embeddings:
        assert model.head.weight is not None
        model.head.rows = _rows(builder, model.head.weight, model)
    if copies(job, model.head.name):
        _copy_head(builder, model)
    if job.lora.target_modules != "all-linear" and targets(job, model.head.name):
        _adapt(builder, model.head, model.head.name, None, model)


def _matrix(
    builder: Builder, name: str, shape: tuple[int, ...], layer: int | None, *, whole: bool = False
) -> Parameter:
    """One of an adapter."""
    return builder.parameter(
        f"{name}.default.weight", shape, layer,
        dtype=builder.job.lora.dtype, trainable=True, category="adapters", whole=whole,
    )  # fmt: skip


def _adapt(builder: Builder, linear: Linear, name: str, layer: int | None, model: Model) -> None:
    rank, whole = builder.job.lora.rank, builder.behaviour.whole_adapters
    a = _matrix(builder, f"{name}.lora_A", (rank, linear.in_features), layer, whole=whole)
    b = _matrix(builder, f"{name}.lora_B", (linear.out_features, rank), layer, whole=whole)
    asked = a.stored_dtype if builder.behaviour.original_parameters else a.dtype
    linear.adapter = Adapter(a, b, builder.job.lora.dropout, asked)
    model.trainable += [a, b]


def _adapt_stack(builder: Builder, module: Module, stack: Stack, layer: int, model: Model) -> None:
    """peft's lora.ParamWrapper: one pair of matrices for all experts."""
    lora, name = builder.job.lora, f"{builder.block_name}.{module.name}"
    a, b = (
        _matrix(builder, f"{name}.{part}", shape, layer)
        for part, shape in zip(("lora_A", "lora_B"), stack_adapter_shapes(job=builder.job, module=module))
    )
    stack.adapter = StackAdapter(a, b, lora.alpha / lora.rank)
    model.trainable += [a, b]


def attach_npt(builder: Builder, model: Model, npt_layers: frozenset[int]) -> None:
    """Modulators are float32 whatever the base is: they are what trains."""
    if builder.job.method != "npt":
        return
    g = builder.g
    d, f = builder.architecture.hidden_size, builder.architecture.intermediate_size
    is_gated = "mlp.up_proj" in model.blocks[0].linears
    shapes = modulator_shapes(builder.job.npt, d, f, is_gated=is_gated)
    check_target(builder.job.npt, is_gated=is_gated)
    g.begin("load_adapters")
    for block in model.blocks:
        if block.layer in npt_layers:
            g.enter(block.layer)
            made = {
                part: builder.parameter(
                    f"{builder.block_name}.np.{part}", shape, block.layer,
                    dtype="float32", trainable=True, category="adapters", whole=True,
                )
                for part, shape in shapes.items()
            }  # fmt: skip
            modulators = {
                stem: NptModulator(
                    made[f"{stem}A"], made[f"{stem}B"], made.get(f"{stem}C"), made.get(f"{stem}bias")
                )
                for stem in ("", "up.", "down.")
                if f"{stem}A" in made
            }
            block.npt = modulators[""]
            block.npt.up, block.npt.down = modulators.get("up."), modulators.get("down.")
            model.trainable += made.values()
    g.enter(None)
