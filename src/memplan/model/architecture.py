"""
`Architecture`: the numbers of a model that decide its memory, and the tensors that follow from them.

Read from a `config.json` or a catalogue entry; nothing here imports transformers or torch, or knows of jobs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor, named as transformers names it."""

    name: str
    """e.g. `model.layers.0.self_attn.q_proj.weight`"""
    shape: tuple[int, ...]
    role: str
    """`linear` (the weight of a linear layer), `bias`, `norm`, `embedding`, `head`"""
    layer: int | None
    """Index of the block it belongs to; None outside the blocks."""

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True)
class LinearModule:
    """One linear layer, named as transformers names the module; what adapters and 4-bit storage attach to."""

    name: str
    """e.g. `model.layers.0.self_attn.q_proj`"""
    in_features: int
    out_features: int
    bias: bool
    layer: int | None
    """Index of the block it belongs to; None for the head."""
    transposed: bool = False
    """A `transformers.pytorch_utils.Conv1D`: its weight is (in_features, out_features)."""

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the weight as stored."""
        if self.transposed:
            return (self.in_features, self.out_features)
        return (self.out_features, self.in_features)


@dataclass(frozen=True)
class Buffer:
    """One tensor of the model that is no parameter but sits on the device."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    layer: int | None


@dataclass(frozen=True)
class Architecture:
    """
    A decoder-only transformer, in the words of `config.json`.

    `family` names the program that the shape writer runs: `llama` covers Llama and Mistral, `qwen2` adds
    biases to q, k and v, `qwen3` adds norms on q and k, `gpt2` is GPT-2.
    """

    name: str
    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    attention_bias: bool = False
    """Biases on q, k and v (and on o where `attention_output_bias`)."""
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    hidden_act: str = "silu"
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    embedding_dropout: float = 0.0
    source: str = ""
    """Where the numbers come from: a file, a catalogue entry and its source."""
    layer_types: tuple[str, ...] = ()
    """`full_attention` or `sliding_attention` of each block where they differ; empty when all are alike."""
