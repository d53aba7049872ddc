"""Tiny models for the NPT tests, one of each supported family, and a tracker of the storages that live."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from memplan.npt.modulator import Modulator

torch.set_num_threads(1)

VARIANTS: dict[str, dict[str, Any]] = {
    "diag": {},
    "diag bias": {"bias": True},
    "outer": {"variant": "outer"},
    "outer sum": {"variant": "outer", "components": 3, "bias": True},
    "gate and up": {"target": "gate_up", "bias": True},
    "linear": {"variant": "linear", "bias": True},
    "linear all": {"variant": "linear", "target": "all", "bias": True},
    "outer all": {"variant": "outer", "target": "all", "components": 2},
    "outer gate and up": {"target": "gate_up", "variant": "outer", "components": 2},
}
"""Fields of a job's `npt`."""
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2")
VOCAB_SIZE = 64


def tiny(
    family: str = "llama",
    *,
    hidden_size: int = 32,
    intermediate_size: int = 48,
    num_layers: int = 4,
    initializer_range: float = 0.25,
    **config: Any,
) -> Any:
    """
    A model in eval mode with seed 0; the large `initializer_range` makes attention and modulation matter.

    Norm weights and biases are moved off their trivial values.
    """
    import transformers

    if family == "gpt2":
        settings = transformers.GPT2Config(
            vocab_size=VOCAB_SIZE,
            n_embd=hidden_size,
            n_inner=intermediate_size,
            n_layer=num_layers,
            n_head=4,
            n_positions=64,
            initializer_range=initializer_range,
            bos_token_id=1,
            eos_token_id=2,
            **config,
        )
    else:
        name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
        settings = getattr(transformers, f"{name}Config")(
            vocab_size=VOCAB_SIZE,
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=hidden_size // 4,
            max_position_embeddings=64,
            initializer_range=initializer_range,
            bos_token_id=1,
            eos_token_id=2,
            **config,
        )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def token_ids(num_sequences: int = 2, num_tokens: int = 11, seed: int = 1) -> torch.Tensor:
    """Random ids without the special ones, (B, S)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB_SIZE, (num_sequences, num_tokens), generator=generator)


def excite(blocks: Iterable[Any], std: float = 0.5) -> None:
    """Give the trained tensors values at which the modulation is far from zero and tanh from linear."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for block in blocks:
            for parameter in block.np.parameters():
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))


def gradients(blocks: Iterable[Any]) -> torch.Tensor:
    """All gradients of the trained tensors as one vector."""
    return torch.cat([p.grad.flatten() for block in blocks for p in block.np.parameters()])


class LiveStorages(TorchDispatchMode):
    """Follows every storage that an operation returns until it is freed, but not those of `known` tensors."""

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.events: list[tuple[str, int, str, tuple[int, ...], str]] = []
        """(operation or `free`, bytes, dtype, shape, operation that allocated it)"""
        self.live_bytes = self.peak_bytes = self.largest_bytes = 0
        self._known = [tensor.untyped_storage() for tensor in known]
        self._live = {id(storage) for storage in self._known}

    def _freed(self, key: int, event: tuple[str, int, str, tuple[int, ...], str]) -> None:
        self._live.discard(key)
        self.live_bytes -= event[1]
        self.events.append(("free", *event[1:]))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if id(storage) in self._live:
                continue
            event = (str(func), storage.nbytes(), str(tensor.dtype)[6:], tuple(tensor.shape), str(func))
            self._live.add(id(storage))
            weakref.finalize(storage, self._freed, id(storage), event)
            self.events.append(event)
            self.live_bytes += storage.nbytes()
            self.peak_bytes = max(self.peak_bytes, self.live_bytes)
            self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        return out


def defined_delta(made: Modulator, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """delta_W^T (d, f) and delta_b (f,) of one token, as the formulas define them; zeros without a bias."""
    bias = torch.zeros(made.A.shape[1], dtype=made.A.dtype) if made.bias is None else made.bias
    rows = torch.cat([made.A, bias[None]])
    if made.npt.variant == "diag":
        whole = rows @ torch.diag(made.npt.modulation_scale * torch.tanh(a @ made.A)) @ made.B
    elif made.npt.variant == "linear":
        whole = rows @ torch.diag(a @ made.C) @ made.B
    else:
        k = made.npt.components
        parts = zip(made.C.chunk(k, 1), rows.chunk(k, 1), made.B.chunk(k, 0))
        whole = sum(torch.outer(A @ (a @ C), (a @ C) @ B) for C, A, B in parts)
    return whole[:-1], whole[-1]
