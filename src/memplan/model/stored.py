"""
How a checkpoint stores the weights of its linear layers: `quantization_config` of its `config.json`.

transformers loads such weights as they are stored, whatever the script asks for (quantizers/auto.py,
merge_quantization_configs).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from memplan.errors import NotTrained

_OF_A_BLOCK = re.compile(r"(^|\.)\d+(\.|$)")
_IN_16_BITS = (
    "A run that dequantises it at loading (`{config}(dequantize=True)`) trains a 16-bit model: to plan that, name a "
    "copy of its config.json without `quantization_config`"
)
_HINTS = {
    "mxfp4": _IN_16_BITS.format(config="Mxfp4Config"),
    "fp8": _IN_16_BITS.format(config="FineGrainedFP8Config"),
    "compressed-tensors": _IN_16_BITS.format(config="CompressedTensorsConfig"),
}
_OTHER_HINT = "Name the checkpoint it was made from, with `method: qlora` to store the base in 4 bits"


class Stored(NamedTuple):
    """Weights that are stored quantised, in the words of a job's `quantization`."""

    type: str
    """`nf4`, `fp4`, `int8` or `gptq`."""
    double_quant: bool = False
    storage: str = "uint8"
    """dtype of the tensors that hold 4 bits of bitsandbytes."""
    compute_dtype: str | None = None
    """What their products are computed in; None where that is not the checkpoint's matter."""
    group_size: int | None = None
    """Inputs that share a scale in GPTQ's format; None: all."""
    skip: tuple[str, ...] | None = None
    """Linear layers that are not quantised; None: the head."""

    @property
    def words(self) -> str:
        """
        >>> Stored("nf4").words, Stored("int8").words, Stored("gptq").words
        ('4 bits (bitsandbytes, nf4)', '8 bits (bitsandbytes)', '4 bits (GPTQ)')
        """
        known = {"int8": "8 bits (bitsandbytes)", "gptq": "4 bits (GPTQ)"}
        return known.get(self.type, f"4 bits (bitsandbytes, {self.type})")

    def settings(self) -> dict[str, Any]:
        """The fields of a job that say the same."""
        fields: dict[str, Any] = {"quantization.type": self.type}
        if self.type == "gptq":
            fields["quantization.group_size"] = self.group_size
        elif self.type != "int8":
            fields |= {
                "quantization.double_quant": self.double_quant,
                "quantization.storage": self.storage,
            }
        return fields if self.skip is None else fields | {"quantization.skip": self.skip}

    def preferences(self) -> dict[str, Any]:
        """What a job that leaves these fields open had best say: what the checkpoint is made for."""
        if self.type == "gptq":
            return {"dtype": "float16", "loop": "hf_trainer"}
        return {} if self.compute_dtype is None else {"dtype": self.compute_dtype}


def read_stored(config: Mapping[str, Any], name: str) -> Stored | None:
    """
    The storage that a `config.json` names; None for plain numbers.

    Raises:
        NotTrained: for what is not planned: AWQ, fp8, mxfp4 and others, other bits of GPTQ, and checkpoints in which
            blocks differ.
    """
    given = config.get("quantization_config") or config.get("compression_config")
    if not given:
        return None
    given = given if isinstance(given, Mapping) else {}
    method = given.get("quant_method")
    in_bits = {
        bits: given.get(f"load_in_{bits}bit", given.get(f"_load_in_{bits}bit")) is True for bits in (4, 8)
    }
    if method is None and any(in_bits.values()):
        method = "bitsandbytes"  # transformers before 4.32 wrote none
    if method == "bitsandbytes" and any(in_bits.values()):
        return _of_bitsandbytes(given, name, bits=4 if in_bits[4] else 8)
    if method == "gptq":
        return _of_gptq(given, name)
    raise NotTrained(
        f"The weights of {name} are stored quantised ({method or 'method not stated'}), and of that bitsandbytes and "
        "GPTQ alone are understood",
        hint=_HINTS.get(str(method), _OTHER_HINT),
    )


def of_single_blocks(names: Collection[str]) -> list[str]:
    """
    Those of the names of modules that say a block.

    >>> of_single_blocks(["lm_head", "model.layers.3.mlp"])
    ['model.layers.3.mlp']
    """
    return [name for name in names if _OF_A_BLOCK.search(name)]


def _of_gptq(given: Mapping[str, Any], name: str) -> Stored:
    """Keys and defaults of transformers' GPTQConfig, and those of gptqmodel for layers that differ."""
    plain: dict[str, tuple[Any, ...]] = {
        "bits": (4,),
        "checkpoint_format": (None, "gptq", "gptq_v2"),
        "format": (None, "gptq", "gptq_v2"),
        "pack_dtype": (None, "int32"),
        "lm_head": (None, False),
        "dynamic": (None, {}),
        "modules_in_block_to_quantize": (None,),
        "is_marlin_format": (None, False),
    }
    for key, values in plain.items():
        if given.get(key) not in values:
            raise NotTrained(
                f"{name} is stored in GPTQ's format with `{key}: {json.dumps(given.get(key))}`, and of it 4 bits in "
                "every linear layer of the blocks are planned",
                hint=_OTHER_HINT,
            )
    group_size = given.get("group_size", 128)
    if (
        isinstance(group_size, bool)
        or not isinstance(group_size, int)
        or (group_size < 1 and group_size != -1)
    ):
        raise NotTrained(
            f"{name} has `group_size: {json.dumps(group_size)}`, and GPTQ's is a positive number, or -1",
            hint=_OTHER_HINT,
        )
    return Stored("gptq", group_size=None if group_size == -1 else group_size)


def _of_bitsandbytes(given: Mapping[str, Any], name: str, *, bits: int) -> Stored:
    """Keys and defaults of transformers' BitsAndBytesConfig."""
    kind = given.get("bnb_4bit_quant_type", "fp4") if bits == 4 else "int8"
    skipped = given.get("llm_int8_skip_modules")
    odd = {
        "bnb_4bit_quant_type": kind not in ("nf4", "fp4", "int8"),
        "llm_int8_threshold": bits == 8 and given.get("llm_int8_threshold", 6.0) != 6.0,
        "llm_int8_has_fp16_weight": bits == 8 and given.get("llm_int8_has_fp16_weight", False) is not False,
    }
    for key, is_odd in odd.items():
        if is_odd:
            raise NotTrained(
                f"{name} has `{key}: {json.dumps(given[key])}`, which is not planned", hint=_OTHER_HINT
            )
    if skipped is not None and not (
        isinstance(skipped, list) and all(isinstance(item, str) for item in skipped)
    ):
        raise NotTrained(f"{name} has `llm_int8_skip_modules` that are no list of names", hint=_OTHER_HINT)
    single = of_single_blocks(skipped or ())
    if single:
        raise NotTrained(
            f"{name} keeps modules of single blocks in 16 bits, such as `{single[0]}`, and plans take blocks for alike",
            hint="Name a checkpoint of the model whose blocks are all quantised, or the one it was made from with "
            "`method: qlora`; `MemplanCallback()` in the Trainer of a script plans the model as it is",
        )
    skip = None if skipped is None else tuple(skipped)
    if bits == 8:
        return Stored("int8", skip=skip)
    return Stored(
        kind,
        double_quant=bool(given.get("bnb_4bit_use_double_quant", False)),
        storage=str(given.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch."),
        compute_dtype=str(given.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch."),
        skip=skip,
    )
