"""`architecture_from_config` reads what transformers reads, and explains what it cannot read."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.errors import ModelError, UnknownModel
from memplan.model import Architecture, architecture_from_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 3,
    "vocab_size": 100,
}


def read(base: dict[str, Any] = LLAMA, **keys: Any) -> Architecture:
    """The architecture of a small config with some keys changed."""
    return architecture_from_config({**base, **keys}, name="m", source="test")


def of_type(model_type: str, class_name: str, **keys: Any) -> dict[str, Any]:
    """The small Llama config under another class."""
    return {**LLAMA, "model_type": model_type, "architectures": [class_name], **keys}


MISTRAL = of_type("mistral", "MistralForCausalLM")
QWEN2 = of_type("qwen2", "Qwen2ForCausalLM", num_key_value_heads=2)
QWEN3 = of_type("qwen3", "Qwen3ForCausalLM", num_key_value_heads=2)


def test_absent_key_value_heads_depend_on_the_class() -> None:
    """Without `num_key_value_heads`, Llama has one per head and Mistral has 8: defaults of the class."""
    assert 4 == read().num_key_value_heads
    assert 8 == read(MISTRAL, num_attention_heads=16).num_key_value_heads
    assert 16 == read(MISTRAL, num_attention_heads=16, num_key_value_heads=None).num_key_value_heads


def test_head_dim() -> None:
    """`head_dim` absent or null is hidden_size / heads; Qwen3's default is 128; a given one wins."""
    assert 16 == read().head_dim
    assert 16 == read(MISTRAL, head_dim=None, num_key_value_heads=2).head_dim
    assert 32 == read(MISTRAL, head_dim=32, num_key_value_heads=2).head_dim
    assert 128 == read(QWEN3).head_dim


def test_biases() -> None:
    """Qwen2 has biases on q, k, v alone; Llama's keys set q, k, v, o and the MLP; Mistral has none."""
    qwen2 = read(QWEN2)
    assert (True, False, False) == (qwen2.attention_bias, qwen2.attention_output_bias, qwen2.mlp_bias)
    llama = read(attention_bias=True, mlp_bias=True)
    assert (True, True, True) == (llama.attention_bias, llama.attention_output_bias, llama.mlp_bias)
    mistral = read(MISTRAL, num_key_value_heads=2, attention_bias=True, mlp_bias=True)
    assert (False, False, False) == (mistral.attention_bias, mistral.attention_output_bias, mistral.mlp_bias)


def test_tied_embeddings_by_default() -> None:
    """GPT-2 ties its head unless told otherwise; the others do not."""
    assert [True, False, False] == [read(GPT2).tie_word_embeddings, read().tie_word_embeddings,
                                    read(QWEN2).tie_word_embeddings]  # fmt: skip
    assert not read(GPT2, tie_word_embeddings=False).tie_word_embeddings


def test_families() -> None:
    """Mistral runs Llama's program; Qwen3 has norms on q and k."""
    families = [read(config, num_key_value_heads=2).family for config in (LLAMA, MISTRAL, QWEN2, QWEN3)]

    assert ["llama", "llama", "qwen2", "qwen3"] == families
    assert [False, True] == [read(QWEN2).qk_norm, read(QWEN3).qk_norm]


def test_gpt2_keys() -> None:
    """GPT-2's own names are read, with an inner size of 4 x n_embd and dropouts of 0.1 by default."""
    gpt2 = read(GPT2)

    assert (48, 2, 3, 16, 192, 1024) == (
        gpt2.hidden_size, gpt2.num_hidden_layers, gpt2.num_attention_heads, gpt2.head_dim,
        gpt2.intermediate_size, gpt2.max_position_embeddings,
    )  # fmt: skip
    assert (0.1, 0.1, 0.1) == (gpt2.attention_dropout, gpt2.residual_dropout, gpt2.embedding_dropout)
    assert "gelu_new" == gpt2.hidden_act
    changed = read(
        GPT2, n_inner=50, attn_pdrop=0, resid_pdrop=0.25, activation_function="relu", n_positions=7
    )
    assert (50, 0.0, 0.25, "relu", 7) == (
        changed.intermediate_size, changed.attention_dropout, changed.residual_dropout,
        changed.hidden_act, changed.max_position_embeddings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("keys", "window", "layer_types"),
    [
        ({}, None, ()),
        ({"use_sliding_window": False, "sliding_window": 9}, None, ()),
        ({"use_sliding_window": True, "sliding_window": None}, None, ()),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 2}, None, ()),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, 9, ()),
        (
            {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
            9,
            ("full_attention", "sliding_attention"),
        ),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 9,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            9,
            ("sliding_attention", "full_attention"),
        ),
    ],
)
def test_sliding_window_of_qwen(
    keys: dict[str, Any], window: int | None, layer_types: tuple[str, ...]
) -> None:
    """Qwen slides only with `use_sliding_window`, and only in the blocks from `max_window_layers` on."""
    qwen = read(QWEN2, **keys)

    assert (window, layer_types) == (qwen.sliding_window, qwen.layer_types)


def test_sliding_window_of_mistral() -> None:
    """Mistral's window is 4096 when the key is absent and none when it is null."""
    assert [4096, None, 9] == [
        read(MISTRAL, num_key_value_heads=2).sliding_window,
        read(MISTRAL, num_key_value_heads=2, sliding_window=None).sliding_window,
        read(MISTRAL, num_key_value_heads=2, sliding_window=9).sliding_window,
    ]


def test_class_without_architectures() -> None:
    """`model_type` alone names the causal model; the class name alone does too."""
    assert "llama" == read(architectures=None).family
    assert "llama" == read(model_type=None).family


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"model_type": "starcoder2", "architectures": ["Starcoder2ForCausalLM"]}, "Starcoder2ForCausalLM"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"model_type": "mistral"}, "LlamaForCausalLM"),
        ({"text_config": {}, "architectures": ["LlavaForConditionalGeneration"]}, "multimodal"),
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
    ],
)
def test_unknown_models(keys: dict[str, Any], says: str) -> None:
    """An architecture without a program is exit code 3, names the class, and says what would settle it."""
    with pytest.raises(UnknownModel) as failure:
        read(**keys)

    assert says in failure.value.message
    assert 3 == failure.value.exit_code
    assert failure.value.hint


def test_text_part_of_a_multimodal_model() -> None:
    """Gemma 3 with its vision tower is not planned as its text part; that part is, and the refusal says how."""
    text = {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "sliding_window": 1024,
    }  # fmt: skip
    whole = {
        "model_type": "gemma3",
        "architectures": ["Gemma3ForConditionalGeneration"],
        "text_config": text,
        "vision_config": {},
    }

    with pytest.raises(UnknownModel, match="multimodal") as failure:
        architecture_from_config(whole, name="google/gemma-3-4b-it", source="test")
    alone = architecture_from_config(text, name="text part", source="test")

    assert "`text_config`" in failure.value.hint
    assert "Gemma3ForCausalLM" in failure.value.hint
    assert ("gemma3_text", 8, 4) == (alone.family, alone.num_attention_heads, alone.num_key_value_heads)


@pytest.mark.parametrize("key", ["add_cross_attention", "reorder_and_upcast_attn"])
def test_unknown_variants_of_gpt2(key: str) -> None:
    """Variants of GPT-2 that change its tensors are not planned as plain GPT-2."""
    with pytest.raises(UnknownModel, match=key):
        read(GPT2, **{key: True})


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": -64}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        ({"hidden_size": 66}, "num_attention_heads"),
        ({"head_dim": 16, "hidden_size": 66}, "num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"attention_dropout": "some"}, "attention_dropout"),
        ({"hidden_act": None}, "hidden_act"),
    ],
)
def test_nonsense(keys: dict[str, Any], named: str) -> None:
    """A config that contradicts itself is an error of the user's that names the key."""
    with pytest.raises(ModelError) as failure:
        read(**keys)

    assert f"`{named}" in failure.value.message


@pytest.mark.parametrize(
    ("base", "keys", "named"),
    [
        (GPT2, {"n_embd": None}, "n_embd"),
        (GPT2, {"n_embd": 50}, "n_head"),
        (QWEN2, {"use_sliding_window": True, "max_window_layers": -1}, "max_window_layers"),
        (QWEN2, {"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
    ],
)
def test_nonsense_of_other_classes(base: dict[str, Any], keys: dict[str, Any], named: str) -> None:
    """Keys that only one class has are checked too."""
    with pytest.raises(ModelError, match=f"`{named}"):
        read(base, **keys)


def test_no_class_at_all() -> None:
    """A JSON object that names no model class is not taken for a model."""
    with pytest.raises(ModelError, match="neither `model_type` nor `architectures`"):
        architecture_from_config({"hidden_size": 64}, name="m", source="test")
