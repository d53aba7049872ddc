"""The GPU catalogue: names as people write them, ambiguous names refused, contexts with their source."""

from __future__ import annotations

import pytest

from memplan.errors import GpuError
from memplan.gpu import context_bytes, find_gpu, list_gpus, match_gpu
from memplan.units import MiB


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("4090", "NVIDIA GeForce RTX 4090"),
        ("rtx-4090", "NVIDIA GeForce RTX 4090"),
        ("geforce_rtx_4090", "NVIDIA GeForce RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "NVIDIA GeForce RTX 4090"),
        ("4090 laptop", "NVIDIA GeForce RTX 4090 Laptop GPU"),
        ("4070 Ti Super", "NVIDIA GeForce RTX 4070 Ti SUPER"),
        ("5060 Ti 16GB", "NVIDIA GeForce RTX 5060 Ti 16GB"),
        ("H100", "NVIDIA H100 80GB HBM3"),
        ("h100 nvl", "NVIDIA H100 NVL"),
        ("A100 80GB", "NVIDIA A100-SXM4-80GB"),
        ("A100-PCIE-40GB", "NVIDIA A100-SXM4-40GB"),
        ("T4", "Tesla T4"),
        ("RTX A6000", "NVIDIA RTX A6000"),
        ("RTX 6000 Ada", "NVIDIA RTX 6000 Ada Generation"),
        ("RTX PRO 6000", "NVIDIA RTX PRO 6000 Blackwell Workstation Edition"),
        ("mi300x", "AMD Instinct MI300X"),
        ("MIG 1g.5gb", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"),
    ],
)
def test_spellings(text: str, name: str) -> None:
    """Case, vendor words, separators and common short forms do not matter."""
    assert name == find_gpu(text).name


@pytest.mark.parametrize(
    ("text", "candidates"),
    [
        ("A100", ["A100-SXM4-40GB", "A100-SXM4-80GB"]),
        ("5060 Ti", ["16GB", "8GB"]),
        ("RTX 4060 Ti", ["16GB", "8GB"]),
        ("V100", ["16GB", "32GB"]),
        ("RTX 6000", ["PRO 6000", "6000 Ada", "Quadro RTX 6000"]),
    ],
)
def test_ambiguous_names(text: str, candidates: list[str]) -> None:
    """A name of cards of different sizes is refused and lists them; `match_gpu` then has no profile."""
    with pytest.raises(GpuError, match="several GPUs") as failure:
        find_gpu(text)
    assert all(candidate in failure.value.message for candidate in candidates)
    assert match_gpu(text) is None


def test_unknown_names() -> None:
    """An unknown name suggests the nearest ones."""
    with pytest.raises(GpuError, match="No GPU is known as `RTX 4009`") as failure:
        find_gpu("RTX 4009")
    assert "`NVIDIA GeForce RTX 4090`" in (failure.value.hint or "")
    with pytest.raises(GpuError, match="No GPU"):
        find_gpu("nvidia geforce")
    assert match_gpu("Some GPU") is None


def test_facts_are_whole() -> None:
    """Every entry has a source, a confidence and one of the known kinds; totals are in the right order."""
    kinds = {"consumer", "laptop", "workstation", "datacenter", "mig", "unified"}
    gpus = list_gpus()

    assert len(gpus) > 90
    assert len(gpus) == len({gpu.name for gpu in gpus})
    for gpu in gpus:
        assert gpu.source
        assert gpu.confidence
        assert gpu.kind in kinds
        assert gpu.sold_as_gb or gpu.kind == "mig"
        if gpu.memory_bytes is not None and gpu.sold_as_gb:
            assert 0.93 < gpu.memory_bytes / (max(gpu.sold_as_gb) * 2**30) <= 1.07
        if gpu.memory_bytes is not None and gpu.torch_total_bytes is not None:
            assert gpu.torch_total_bytes < gpu.memory_bytes


@pytest.mark.parametrize(
    ("text", "mib", "says"),
    [
        ("T4", 135 + 256, "measured on this card"),
        ("RTX 3090", 256 + 256, "measured on this card"),
        ("RTX 4090", 426 + 256, "not measured on this card but on the larger NVIDIA RTX 6000 Ada"),
        ("RTX A5000", 482 + 256, "not measured on this card but on the larger NVIDIA A100"),
        ("H100", 942, "not measured on NVIDIA H100"),
        ("RTX 5090", 942, "not measured on NVIDIA GeForce RTX 5090"),
        (None, 942, "not measured on this card"),
    ],
)
def test_context(text: str | None, mib: int, says: str) -> None:
    """A context is as measured on the card or a larger one of its generation, else the largest reported."""
    size, source = context_bytes(find_gpu(text) if text else None)

    assert mib * MiB == size
    assert says in source
