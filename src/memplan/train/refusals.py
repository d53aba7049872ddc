"""What `memplan train` cannot do, refused before anything is loaded or written."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from memplan.errors import DataError, ModelError, RunError
from memplan.job.data_names import BUILT_IN_DATA, PATH_FIELDS, is_hub_dataset
from memplan.job.fields import field_value
from memplan.job.spec import Job
from memplan.model import resolve_config
from memplan.model.config import class_name_of, is_masked_lm
from memplan.tape.sharded.sharding import SHARDED
from memplan.train.trackers import PACKAGES

if TYPE_CHECKING:
    from memplan.job.load import LoadedJob

TORCH_OPTIMIZERS = ("adamw", "sgd", "adafactor")
"""torch's own; the others are those of bitsandbytes."""

INSTALL = 'pip install "memplan[train]"'


def check_trainable(loaded: LoadedJob) -> None:
    """
    Refuse what this trainer cannot do, before anything is loaded or written.

    Raises:
        RunError, DataError: with the field and what to set instead.
    """
    job = loaded.job
    refuse_untrainable(job)
    config: dict[str, Any] = {}
    with suppress(ModelError):  # who plans or builds the model says that it cannot be found
        config = resolve_config(job.model, base_dir=loaded.base_dir).config
    refuse_encoder(job, config)
    if config.get("quantization_config"):
        raise RunError(
            f"the weights of `{job.model}` are stored quantised, and this trainer reads 16 or 32 bits",
            hint="name the checkpoint it was made from, which `method: qlora` stores in 4 bits as it loads it",
        )
    _check_packages(job)
    if job.data.train is None:
        raise DataError(
            "the job names no training data", hint=f"set it, e.g. `--set data.train={BUILT_IN_DATA}`"
        )
    for name in PATH_FIELDS:
        source = field_value(job, name)
        path = None if source in (None, BUILT_IN_DATA) else loaded.resolve_path(source)
        if path is not None and not path.exists() and not is_hub_dataset(source, path):
            raise DataError(f"`{source}` does not exist ({path})", hint=f"check `{name}`")


def refuse_untrainable(job: Job) -> None:
    """
    Refuse jobs that can be planned but not trained here.

    Raises:
        RunError: with the field and what to set instead.
    """
    sharded = job.parallel.strategy != "NO_SHARD" or job.offload.params
    as_copied = job.replace(**{"lora.modules_to_save_dtype": None}).saved_dtype
    refusals: list[tuple[bool, str, str]] = [
        (
            job.has_gptq_base,
            "`quantization.type: gptq` can be planned but not trained here: this trainer packs 16-bit weights",
            "use `--set quantization.type=nf4`, with the checkpoint that the one in GPTQ's format was made from",
        ),
        (
            job.parallel.strategy.startswith("ZERO_"),
            f"`parallel.strategy: {job.parallel.strategy}` is DeepSpeed's and can be planned but not trained here",
            "use `--set parallel.strategy=FULL_SHARD`, or `SHARD_GRAD_OP`",
        ),
        (
            max(job.parallel.tp, job.parallel.pp, job.parallel.cp, job.parallel.ep) > 1,
            "`parallel.tp`, `pp`, `cp` and `ep` cannot be trained yet",
            "set them to 1; `parallel.dp_shard` with `FULL_SHARD` spreads a model over GPUs",
        ),
        (
            bool(job.modules_to_save) and job.saved_dtype == "float16" and not job.has_float16_adapters,
            "copies of `lora.modules_to_save` cannot be float16: their gradients would be, and torch refuses to "
            "unscale those",
            "use bfloat16, or `--set lora.modules_to_save_dtype=float32 --set autocast=float16`",
        ),
        (
            bool(job.modules_to_save) and not (sharded or job.autocast) and job.saved_dtype != as_copied,
            f"`lora.modules_to_save_dtype: {job.lora.modules_to_save_dtype}` does not go with hidden states in "
            f"{as_copied}, which nothing casts",
            "use `--set lora.modules_to_save_dtype=null`, or `--set autocast=bfloat16`",
        ),
        (
            job.parallel.strategy in SHARDED and job.offload.optimizer and not job.offload.params,
            "`offload.optimizer` alone cannot be trained with sharded weights",
            "use `--set offload.params=true`, which keeps the optimizer's states on the host as well",
        ),
        (
            job.offload.optimizer and job.optimizer not in TORCH_OPTIMIZERS,
            f"`offload.optimizer` steps on the CPU, and `optimizer: {job.optimizer}` has no step there",
            "use `--set optimizer=adamw`, or `--set offload.optimizer=false`",
        ),
        (
            job.offload.optimizer and job.method != "npt" and "float16" in (job.autocast, job.dtype),
            "float16 needs loss scaling, which is not done for gradients on the host",
            "use bfloat16, or `--set offload.optimizer=false`",
        ),
        (
            sharded and job.optimizer not in ("adamw", "sgd"),
            f"`optimizer: {job.optimizer}` cannot step sharded weights",
            "use `--set optimizer=adamw`, or `--set parallel.strategy=NO_SHARD` if a whole model fits",
        ),
        (
            sharded and job.optimizer == "sgd" and job.optimizer_kernel == "fused",
            "torch's fused step of `optimizer: sgd` knows no sharded weights",
            "use `--set optimizer_kernel=foreach`",
        ),
        (
            sharded and job.method == "qlora" and job.quantization.kbit_preparation,
            "`quantization.kbit_preparation` makes weights float32, and sharded ones are gathered in one dtype",
            "use `--set quantization.kbit_preparation=false`",
        ),
        (
            job.method == "full" and job.dtype == "float16",
            "weights that train cannot be float16: their gradients would be, and torch refuses to unscale those",
            "use `--set dtype=float32`, or bfloat16",
        ),
        (
            job.method == "npt" and job.autocast == "float16",
            "NPT blocks run their own backward pass, which knows no loss scaling for `autocast: float16`",
            "use `--set autocast=bfloat16`, or `--set autocast=null`",
        ),
        (
            sharded and job.method != "npt" and "float16" in (job.autocast, job.dtype),
            "float16 needs loss scaling, which is not done for sharded gradients",
            "use bfloat16, or `--set parallel.strategy=NO_SHARD` if a whole model fits",
        ),
    ]
    for refused, message, hint in refusals:
        if refused:
            raise RunError(message, hint=hint)


def refuse_encoder(job: Job, config: Mapping[str, Any]) -> None:
    """
    Refuse a model that predicts masked tokens.

    Args:
        config: the model's `config.json`.

    Raises:
        RunError: with what can be done with it.
    """
    if is_masked_lm(config):
        raise RunError(
            f"`memplan train` trains causal language models, and `{job.model}` is an encoder "
            f"({class_name_of(config)}), which can be planned but not trained here",
            hint="train it with transformers' Trainer, and plan that with `--set loop=hf_trainer`",
        )


def check_device(job: Job, device_type: str) -> None:
    """
    Refuse what needs a CUDA GPU where there is none.

    Raises:
        RunError: with the field and what to set instead.
    """
    if device_type == "cuda":
        return
    needs_cuda = [
        (job.optimizer not in TORCH_OPTIMIZERS, f"`optimizer: {job.optimizer}`", "optimizer=adamw"),
        (job.loss == "fused" and job.method != "npt", "`loss: fused`", "loss=chunked"),
        (job.attention == "flash_attention_2", "`attention: flash_attention_2`", "attention=sdpa"),
    ]
    for wanted, what, instead in needs_cuda:
        if wanted:
            raise RunError(
                f"{what} runs on CUDA only, and torch sees no CUDA GPU here", hint=f"use `--set {instead}`"
            )


def _check_packages(job: Job) -> None:
    packages = ["torch", "transformers", "safetensors"]
    packages += ["peft"] * (job.method in ("lora", "qlora")) + ["bitsandbytes"] * job.has_quantized_base
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise RunError(
            f"training needs {', '.join(f'`{name}`' for name in missing)}, not installed here", hint=INSTALL
        )
    tracker = job.train.report_to
    needed = [
        (
            tracker != "none",
            PACKAGES.get(tracker, ""),
            f"`train.report_to: {tracker}`",
            "--set train.report_to=none",
        ),
        (job.loss == "fused" and job.method != "npt", "liger_kernel", "`loss: fused`", "--set loss=chunked"),
        (
            job.attention == "flash_attention_2",
            "flash_attn",
            "`attention: flash_attention_2`",
            "--set attention=sdpa",
        ),
        (
            job.optimizer not in TORCH_OPTIMIZERS,
            "bitsandbytes",
            f"`optimizer: {job.optimizer}`",
            "--set optimizer=adamw",
        ),
    ]
    for wanted, package, what, instead in needed:
        if wanted and find_spec(package) is None:
            name = package.replace("_", "-")
            raise RunError(
                f"{what} needs the package `{name}`, not installed here",
                hint=f"pip install {name}, or `{instead}`",
            )
