"""What cards and versions are called, as numbers, and what goes by them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

CUBLAS_WORKSPACE_BYTES = 8_519_680
"""Per handle and stream before Hopper: 4096 KiB * 2 + 16 KiB * 8 (ATen/cuda/CublasHandlePool.cpp)."""
CUBLAS_WORKSPACE_BYTES_HOPPER = 32 << 20
"""On Hopper, and on Blackwell since torch 2.12."""
CUBLASLT_WORKSPACE_BYTES = 1 << 20


def expert_masks(transformers: tuple[int, ...]) -> str:
    """As `Behaviour.expert_masks`; versions before 5.13 are not planned for."""
    if (5, 17) <= transformers < (5, 18):
        return "products"
    return "sum" if (5, 13) <= transformers < (5, 17) else "none"


def compute_capability(gpu: str | None) -> tuple[int, int] | None:
    """Of the card that a job names; None where it names none, or one that is not in the catalogue."""
    from memplan.gpu.catalogue import match_gpu

    profile = None if gpu is None else match_gpu(gpu)
    return None if profile is None else profile.compute_capability


def version_numbers(text: str) -> tuple[int, ...]:
    """
    The numbers of a version.

    >>> version_numbers("4.45.2")
    (4, 45, 2)
    """
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())


def cublas_workspace(torch: tuple[int, ...], compute_capability: tuple[int, int]) -> int:
    """
    Bytes that cuBLAS keeps per handle and stream: 32 MiB on sm90, since torch 2.12 on sm10x and sm12x as well
    (pytorch#175344), and since 2.14 on sm11x (ATen/cuda/CublasHandlePool.cpp, parseChosenWorkspaceSize; read off the
    libraries of 2.11 to 2.15). From 2.15 on each product takes it and gives it back (pytorch#194311), which is not
    planned: plans count what was kept before, and so no less. Up to 1.12 cuBLAS took it from the driver, not from
    torch's allocator (pytorch#85292).
    """
    if () < torch < (1, 13):  # a version that cannot be read is ()
        return 0
    large = {9}
    if torch >= (2, 12):
        large |= {10, 12}
    if torch >= (2, 14):
        large.add(11)
    return CUBLAS_WORKSPACE_BYTES_HOPPER if compute_capability[0] in large else CUBLAS_WORKSPACE_BYTES


def cublaslt_workspace(torch: tuple[int, ...]) -> int:
    """
    Bytes that cuBLASLt, which runs products with a bias, keeps beside cuBLAS's workspace, per handle and stream: torch
    2.9 to 2.11 (ATen/cuda/CublasHandlePool.cpp, getCUDABlasLtWorkspace; pytorch#156495). Since 2.12 it works in
    cuBLAS's (#175879); before 2.9 it took as much for every product and gave it back, which is not planned.
    """
    return CUBLASLT_WORKSPACE_BYTES if (2, 9) <= torch < (2, 12) else 0


class GptqSoftware(NamedTuple):
    """What computes with weights that GPTQ has quantised, and with adapters beside them (tape/gptq.py)."""

    kernel: str = "compiled"
    """
    `compiled` is gptqmodel's TorchLinear, with which its TritonV2Linear trains too (7.3, qlinear/tritonv2.py, forward);
    `triton` fms-acceleration's; `unpacked` auto-gptq's without kernels that have no backward (`disable_exllama`), of a
    checkpoint without `desc_act`.
    """
    masks_in_place: bool = False
    """auto-gptq before 0.5 (nn_modules/qlinear/qlinear_cuda_old.py)."""
    zero_bias: bool = False
    """Every layer has a bias, of zeros where the model has none: optimum before 1.20 (gptq/quantizer.py; #1827)."""
    adds_in_place: bool = False
    """
    Adapters are added to the output in place, and their input is cast without autocast alone: peft before 0.16
    (tuners/lora/gptq.py).
    """

    @classmethod
    def of(cls, versions: Mapping[str, str]) -> GptqSoftware:
        """
        By the packages that are named.

        >>> GptqSoftware.of({"auto_gptq": "0.4.2", "optimum": "1.13.2"}).kernel
        'unpacked'
        """
        kernel = "unpacked" if "auto_gptq" in versions else "compiled"
        return cls(
            kernel="triton" if "fms_acceleration_peft" in versions else kernel,
            masks_in_place="auto_gptq" in versions and version_numbers(versions["auto_gptq"]) < (0, 5),
            zero_bias="optimum" in versions and version_numbers(versions["optimum"]) < (1, 20),
            adds_in_place="peft" in versions and version_numbers(versions["peft"]) < (0, 16),
        )
