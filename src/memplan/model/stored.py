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
    """`nf4` or `fp4`."""
    double_quant: bool
    storage: str = "uint8"
    """dtype of the tensors that hold them."""
    compute_dtype: str = "float32"
    """What products are computed in."""
    skip: tuple[str, ...] | None = None
    """Linear layers that are not quantised; None: the head."""

    @property
    def words(self) -> str:
        """
        >>> Stored("nf4", True).words
        '4 bits (bitsandbytes, nf4)'
        """
        return f"4 bits (bitsandbytes, {self.type})"

    def settings(self) -> dict[str, Any]:
        """The fields of a job that say the same."""
        fields: dict[str, Any] = {
            "quantization.type": self.type,
            "quantization.double_quant": self.double_quant,
            "quantization.storage": self.storage,
        }
        return fields if self.skip is None else fields | {"quantization.skip": self.skip}


def read_stored(config: Mapping[str, Any], name: str) -> Stored | None:
    """
    The storage that a `config.json` names; None for plain numbers.

    Raises:
        NotTrained: for what is not planned: GPTQ, AWQ, fp8, mxfp4, 8 bits of bitsandbytes and others, and for
            checkpoints of bitsandbytes in which blocks differ.
    """
    given = config.get("quantization_config") or config.get("compression_config")
    if not given:
        return None
    given = given if isinstance(given, Mapping) else {}
    method = given.get("quant_method")
    in_4_bits = given.get("load_in_4bit", given.get("_load_in_4bit", False))
    if method is None and in_4_bits:
        method = "bitsandbytes"  # transformers before 4.32 wrote none
    if method == "bitsandbytes" and in_4_bits is True:
        return _of_bitsandbytes(given, name)
    words = "bitsandbytes, 8 bits" if method == "bitsandbytes" else method or "method not stated"
    raise NotTrained(
        f"The weights of {name} are stored quantised ({words}), and of that only 4 bits of bitsandbytes are understood",
        hint=_HINTS.get(str(method), _OTHER_HINT),
    )


def of_single_blocks(names: Collection[str]) -> list[str]:
    """
    Those of the names of modules that say a block.

    >>> of_single_blocks(["lm_head", "model.layers.3.mlp"])
    ['model.layers.3.mlp']
    """
    return [name for name in names if _OF_A_BLOCK.search(name)]


def _of_bitsandbytes(given: Mapping[str, Any], name: str) -> Stored:
    """Keys and defaults of transformers' BitsAndBytesConfig."""
    kind, skipped = given.get("bnb_4bit_quant_type", "fp4"), given.get("llm_int8_skip_modules")
    if kind not in ("nf4", "fp4"):
        raise NotTrained(
            f"{name} has `bnb_4bit_quant_type: {json.dumps(kind)}`, which bitsandbytes does not know",
            hint=_OTHER_HINT,
        )
    if skipped is not None and not (
        isinstance(skipped, list) and all(isinstance(item, str) for item in skipped)
    ):
        raise NotTrained(f"{name} has `llm_int8_skip_modules` that are no list of names", hint=_OTHER_HINT)
    single = of_single_blocks(skipped or ())
    if single:
        raise NotTrained(
            f"{name} keeps modules of single blocks in 16 bits, such as `{single[0]}`, and plans take blocks for alike",
            hint="Name a checkpoint of the model whose blocks are all in 4 bits, or the one it was made from with "
            "`method: qlora`; `MemplanCallback()` in the Trainer of a script plans the model as it is",
        )
    return Stored(
        kind,
        double_quant=bool(given.get("bnb_4bit_use_double_quant", False)),
        storage=str(given.get("bnb_4bit_quant_storage") or "uint8").removeprefix("torch."),
        compute_dtype=str(given.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch."),
        skip=None if skipped is None else tuple(skipped),
    )
