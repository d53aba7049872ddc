"""
Every tensor of a model, in the order and with the names of `model.named_parameters()` in transformers 5.

One description of a family's modules (`_block`, `_modules_before`, `_modules_after`) gives parameters, linear
layers and counts. The tests hold it to transformers itself, built on meta tensors from the same config.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from memplan.model.architecture import Architecture, Buffer, LinearModule, Parameter


@dataclass(frozen=True)
class _Module:
    """A leaf module with its parameters; `name` is relative to the block when it is part of one."""

    name: str
    role: str
    """`linear`, `norm`, `embedding` or `head`"""
    shape: tuple[int, ...]
    """Of the weight."""
    bias: bool = False
    transposed: bool = False


def parameters(architecture: Architecture) -> tuple[Parameter, ...]:
    """
    Every parameter in the order of `model.named_parameters()`; a head tied to the embedding is not listed.

    Order as registered in `transformers/models/{llama,mistral,qwen2,qwen3,gpt2}/modeling_*.py`.
    """
    return tuple(
        parameter
        for prefix, layer, module in _modules(architecture)
        if not (module.role == "head" and architecture.tie_word_embeddings)
        for parameter in _parameters_of(prefix, layer, module)
    )


def linear_modules(architecture: Architecture) -> tuple[LinearModule, ...]:
    """
    Every linear layer in the order of `model.named_modules()`, the head included, tied or not.

    GPT-2's `Conv1D` layers count as linear layers and are flagged `transposed`.
    """
    linears = []
    for prefix, layer, module in _modules(architecture):
        if module.role in ("linear", "head"):
            in_features, out_features = module.shape if module.transposed else reversed(module.shape)
            name = prefix + module.name
            linears.append(
                LinearModule(name, in_features, out_features, module.bias, layer, module.transposed)
            )
    return tuple(linears)


def buffers(architecture: Architecture) -> tuple[Buffer, ...]:
    """
    Tensors on the device that are no parameters: the rotary frequencies, float32 whatever the weights are.

    `LlamaRotaryEmbedding` keeps a copy (`original_inv_freq`) for rotary types that change with the length.
    GPT-2 has none in transformers 5 (its causal mask is no longer a buffer).
    """
    if architecture.family == "gpt2":
        return ()
    shape = (architecture.head_dim // 2,)
    names = ("model.rotary_emb.inv_freq", "model.rotary_emb.original_inv_freq")
    return tuple(Buffer(name, shape, "float32", None) for name in names)


def num_parameters(architecture: Architecture) -> int:
    """Elements of all parameters, a tied head counted once."""
    outside = [*_modules_before(architecture), *_modules_after(architecture)]
    if architecture.tie_word_embeddings:
        outside = [module for module in outside if module.role != "head"]
    in_block = sum(map(_num_elements, _block(architecture)))
    return sum(map(_num_elements, outside)) + architecture.num_hidden_layers * in_block


def _modules(architecture: Architecture) -> Iterator[tuple[str, int | None, _Module]]:
    """(prefix of the name, block index, module), in order of registration."""
    block = _block(architecture)
    block_prefix = "transformer.h" if architecture.family == "gpt2" else "model.layers"
    for module in _modules_before(architecture):
        yield "", None, module
    for layer in range(architecture.num_hidden_layers):
        prefix = f"{block_prefix}.{layer}."
        for module in block:
            yield prefix, layer, module
    for module in _modules_after(architecture):
        yield "", None, module


def _parameters_of(prefix: str, layer: int | None, module: _Module) -> Iterator[Parameter]:
    yield Parameter(f"{prefix}{module.name}.weight", module.shape, module.role, layer)
    if module.bias:
        role = "norm" if module.role == "norm" else "bias"
        yield Parameter(f"{prefix}{module.name}.bias", (_out_features(module),), role, layer)


def _num_elements(module: _Module) -> int:
    return sum(parameter.num_elements for parameter in _parameters_of("", None, module))


def _out_features(module: _Module) -> int:
    return module.shape[-1] if module.transposed else module.shape[0]


def _modules_before(architecture: Architecture) -> tuple[_Module, ...]:
    hidden_size, vocab_size = architecture.hidden_size, architecture.vocab_size
    if architecture.family == "gpt2":
        return (
            _Module("transformer.wte", "embedding", (vocab_size, hidden_size)),
            _Module("transformer.wpe", "embedding", (architecture.max_position_embeddings, hidden_size)),
        )
    return (_Module("model.embed_tokens", "embedding", (vocab_size, hidden_size)),)


def _modules_after(architecture: Architecture) -> tuple[_Module, ...]:
    hidden_size = architecture.hidden_size
    head = _Module("lm_head", "head", (architecture.vocab_size, hidden_size))
    if architecture.family == "gpt2":
        return (_Module("transformer.ln_f", "norm", (hidden_size,), bias=True), head)
    return (_Module("model.norm", "norm", (hidden_size,)), head)


def _block(architecture: Architecture) -> tuple[_Module, ...]:
    """The modules of one block; all blocks of a model have the same."""
    hidden_size, intermediate_size = architecture.hidden_size, architecture.intermediate_size
    if architecture.family == "gpt2":
        return (
            _Module("ln_1", "norm", (hidden_size,), bias=True),
            _Module("attn.c_attn", "linear", (hidden_size, 3 * hidden_size), bias=True, transposed=True),
            _Module("attn.c_proj", "linear", (hidden_size, hidden_size), bias=True, transposed=True),
            _Module("ln_2", "norm", (hidden_size,), bias=True),
            _Module("mlp.c_fc", "linear", (hidden_size, intermediate_size), bias=True, transposed=True),
            _Module("mlp.c_proj", "linear", (intermediate_size, hidden_size), bias=True, transposed=True),
        )
    head_dim = architecture.head_dim
    query_size = architecture.num_attention_heads * head_dim
    key_value_size = architecture.num_key_value_heads * head_dim
    qkv_bias, output_bias, mlp_bias = (
        architecture.attention_bias,
        architecture.attention_output_bias,
        architecture.mlp_bias,
    )
    modules = [
        _Module("self_attn.q_proj", "linear", (query_size, hidden_size), bias=qkv_bias),
        _Module("self_attn.k_proj", "linear", (key_value_size, hidden_size), bias=qkv_bias),
        _Module("self_attn.v_proj", "linear", (key_value_size, hidden_size), bias=qkv_bias),
        _Module("self_attn.o_proj", "linear", (hidden_size, query_size), bias=output_bias),
    ]
    if architecture.qk_norm:
        modules += [
            _Module("self_attn.q_norm", "norm", (head_dim,)),
            _Module("self_attn.k_norm", "norm", (head_dim,)),
        ]
    modules += [
        _Module("mlp.gate_proj", "linear", (intermediate_size, hidden_size), bias=mlp_bias),
        _Module("mlp.up_proj", "linear", (intermediate_size, hidden_size), bias=mlp_bias),
        _Module("mlp.down_proj", "linear", (hidden_size, intermediate_size), bias=mlp_bias),
        _Module("input_layernorm", "norm", (hidden_size,)),
        _Module("post_attention_layernorm", "norm", (hidden_size,)),
    ]
    return tuple(modules)
