"""
The published runs of litgpt on one GPU: what was run, and at which commit. What the sources say:

    8641822    tutorials/resource-tables.md, finetune/lora.py: the first iteration holds the longest sample, and the
               batch is padded to it; gradients of 128 samples are summed up. A100 40 GB, torch 2.1
    43c44323   config_hub/finetune, finetune/lora.py: 8 samples to a step, none longer than 512 tokens; torch 2.2
    0cc02afa   the commit that added those tables. Llama 2 holds more there than at 8641822, which they name: its norm
               is computed in float32 (6178c7cc)
    0f021f3a   finetune/adapter.py and adapter_v2.py, and their rows of the same tables
    f247be87   the same for phi-3
    00af8b0d   the same for Llama 3.2

Fabric gives what the model returns in float32 (HalfPrecision.convert_output): the logits, chunk by chunk. The loop
keeps them until the next iteration has others. How long the batch before the longest was is published for the first
table alone, where there was none; for the others it is taken to be as long. In 4 bits that is an assumption that
matters: before 0.43.2 bitsandbytes keeps the inputs of its products with the graph, and so with the logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class LitGpt:
    """One run."""

    commit: str
    model: str
    """Its name in litgpt's configurations."""
    length: int
    """Tokens of the longest batch."""
    micro_batch: int = 1
    package: str = "litgpt"
    """What litgpt's package was called."""
    rank: int = 8
    method: str = "lora"
    """`lora`, `adapter` or `adapter_v2`: litgpt's module and script."""
    quantization: str = ""
    """`nf4` or `nf4-dq` of Lightning's plugin, for every linear layer; empty: none."""
    everywhere: bool = False
    """Adapters at every linear layer, the head too; else at queries and values."""
    iterations: int = 2
    """Of a step, each with as many tokens."""
    steps: int = 2
    gpu: str = "A10G"


_TABLE = LitGpt("8641822", "phi-1_5", 1044, package="lit_gpt", iterations=1, steps=1, gpu="A100 40GB")
_STABLELM = replace(_TABLE, model="stablelm-base-alpha-3b", length=1034)
_LLAMA = replace(_TABLE, commit="0cc02afa", model="Llama-2-7b-hf", length=1304)
_ADAPTER = replace(_STABLELM, commit="0f021f3a", method="adapter")
_ADAPTER_V2 = replace(_ADAPTER, method="adapter_v2")
_LLAMA_ADAPTER = {"model": "Llama-2-7b-hf", "length": 1304}
_HUB = LitGpt("43c44323", "Meta-Llama-3-8B", 512, rank=32)
_EVERYWHERE = replace(_HUB, rank=8, everywhere=True, micro_batch=4)

RUNS = {
    "litgpt-rt-phi-1_5-bf16-mbs2": replace(_TABLE, micro_batch=2),
    "litgpt-rt-stablelm-base-alpha-3b-bf16-mbs1": _STABLELM,
    "litgpt-rt-stablelm-base-alpha-3b-bf16-mbs4": replace(_STABLELM, micro_batch=4),
    "litgpt-rt-phi-1_5-bnb.nf4-mbs1": replace(_TABLE, quantization="nf4"),
    "litgpt-rt-phi-1_5-bnb.nf4-dq-mbs1": replace(_TABLE, quantization="nf4-dq"),
    "litgpt-rt-stablelm-base-alpha-3b-bnb.nf4-mbs1": replace(_STABLELM, quantization="nf4"),
    "litgpt-rt-stablelm-base-alpha-3b-bnb.nf4-dq-mbs1": replace(_STABLELM, quantization="nf4-dq"),
    "litgpt-rt-llama-2-7b-bnb.nf4-dq-mbs1": replace(_LLAMA, quantization="nf4-dq"),
    "litgpt-rt-llama-2-13b-bnb.nf4-dq-mbs1": replace(_LLAMA, model="Llama-2-13b-hf", quantization="nf4-dq"),
    "litgpt-rt-adapter-stablelm-base-alpha-3b-bf16": _ADAPTER,
    "litgpt-rt-adapter-stablelm-base-alpha-3b-nf4": replace(_ADAPTER, quantization="nf4"),
    "litgpt-rt-adapter-stablelm-base-alpha-3b-nf4-dq": replace(_ADAPTER, quantization="nf4-dq"),
    "litgpt-rt-adapter-llama-2-7b-nf4": replace(_ADAPTER, quantization="nf4", **_LLAMA_ADAPTER),
    "litgpt-rt-adapter-llama-2-7b-nf4-dq": replace(_ADAPTER, quantization="nf4-dq", **_LLAMA_ADAPTER),
    "litgpt-rt-adapter_v2-stablelm-base-alpha-3b-nf4": replace(_ADAPTER_V2, quantization="nf4"),
    "litgpt-rt-adapter_v2-stablelm-base-alpha-3b-nf4-dq": replace(_ADAPTER_V2, quantization="nf4-dq"),
    "litgpt-rt-adapter_v2-llama-2-7b-nf4-dq": replace(_ADAPTER_V2, quantization="nf4-dq", **_LLAMA_ADAPTER),
    "litgpt-hub-llama-3-8b-lora": _HUB,
    "litgpt-hub-llama-3.2-1b-lora": replace(_HUB, commit="00af8b0d", model="Llama-3.2-1B"),
    "litgpt-hub-llama-3.2-3b-lora": replace(_HUB, commit="00af8b0d", model="Llama-3.2-3B"),
    "litgpt-hub-mistral-7b-lora": replace(_HUB, model="Mistral-7B-v0.1", micro_batch=2),
    "litgpt-hub-llama-3.2-3b-qlora": replace(
        _HUB, commit="00af8b0d", model="Llama-3.2-3B", micro_batch=2, quantization="nf4"
    ),
    "litgpt-hub-mistral-7b-qlora": replace(_HUB, model="Mistral-7B-v0.1", micro_batch=2, quantization="nf4"),
    "litgpt-hub-phi-2-qlora": replace(_EVERYWHERE, model="phi-2", quantization="nf4"),
    "litgpt-hub-phi-3-qlora": replace(
        _EVERYWHERE, commit="f247be87", model="Phi-3-mini-4k-instruct", quantization="nf4"
    ),
    "litgpt-hub-phi-2-lora": replace(_EVERYWHERE, model="phi-2"),
    "litgpt-hub-phi-3-lora": replace(_EVERYWHERE, commit="f247be87", model="Phi-3-mini-4k-instruct"),
}
"""By case of `data/published.json`."""
