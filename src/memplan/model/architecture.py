"""
`Architecture`: the numbers of a model that decide its memory, and the tensors that follow from them.

Read from a `config.json` or a catalogue entry; nothing here imports transformers or torch, or knows of jobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from memplan.model.stored import Stored


class Parameter(NamedTuple):
    """One parameter tensor, named as transformers names it."""

    name: str
    """e.g. `model.layers.0.self_attn.q_proj.weight`"""
    shape: tuple[int, ...]
    role: str
    """`linear` (the weight of a linear layer), `bias`, `norm`, `embedding`, `head`, `router`, `experts`"""
    layer: int | None
    """Index of the block it belongs to; None outside the blocks."""

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        count = 1
        for extent in self.shape:
            count *= extent
        return count


class LinearModule(NamedTuple):
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


class Buffer(NamedTuple):
    """One tensor of the model that is no parameter but sits on the device."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None
    """None: that of the weights."""
    layer: int | None


class Outline(NamedTuple):
    """
    What of an `Architecture` is known of any model: what its changes are chosen by. 0 where its config does not say.
    """

    name: str
    family: str
    hidden_size: int
    num_hidden_layers: int
    head_dim: int
    max_position_embeddings: int
    attn_logit_softcapping: float | None
    stored: Stored | None


@dataclass(frozen=True)
class Architecture:
    """
    A decoder-only transformer, or an encoder, in the words of `config.json`.

    `family` names the layout and the program: the `model_type` of its config, except that `llama` covers Mistral too.
    """

    name: str
    family: str
    hidden_size: int
    intermediate_size: int
    """Width of the MLP; of one expert where there are experts."""
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
    num_experts: int = 0
    """0: an MLP in every block."""
    experts_per_token: int = 0
    parallel_residual: bool = False
    """Attention and MLP both read the block's input, and their outputs are added to it together."""
    separate_norms: bool = False
    """A norm each in front of attention and MLP that run side by side; else they share one."""
    grouped_projection: bool = False
    """The fused projection holds, for each key head, its queries, it and its value (Falcon 40B)."""
    normalized_routing: bool = False
    """The weights of the chosen experts are divided by their sum (Mixtral always does)."""
    source: str = ""
    """Where the numbers come from: a file, a catalogue entry and its source."""
    layer_types: tuple[str, ...] = ()
    """
    `full_attention` or `sliding_attention` of each block; empty where all are alike: all slide if there is a window.
    """
    rotary_dim: int | None = None
    """Channels of each head that rotary embeddings turn; None for all."""
    attn_logit_softcapping: float | None = None
    """c of `c * tanh(scores / c)`, before the mask; None for none."""
    final_logit_softcapping: float | None = None
    """The same of the logits."""
    logits_scaling: float | None = None
    """What the logits are divided by; None where they are not."""
    clip_qkv: float | None = None
    """Bound on queries, keys and values; None for none."""
    tokenizer_size: int | None = None
    """Tokens that its tokenizer has before any are added; None: as many as there are embeddings."""
    is_encoder: bool = False
    """Every token sees all others, and masked ones are predicted from where they stand."""
    type_vocab_size: int = 0
    """Kinds of tokens, such as those of a first and a second sentence, that have an embedding each."""
    stored: Stored | None = None
    """How the checkpoint stores the weights of linear layers, where that is not as plain numbers."""
    is_resized: bool = False
    """`vocab_size` counts the rows for added tokens already."""
    stored_dtype: str | None = None
    """dtype of the checkpoint, as its config says; None where that is silent."""

    @property
    def attention_kinds(self) -> tuple[str, ...]:
        """The kinds of attention that occur, sorted."""
        if self.layer_types:
            return tuple(sorted(set(self.layer_types)))
        return ("full_attention" if self.sliding_window is None else "sliding_attention",)
