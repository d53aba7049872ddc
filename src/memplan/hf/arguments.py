"""A job as transformers' TrainingArguments."""

from __future__ import annotations

from dataclasses import fields
from inspect import signature
from typing import Any

from memplan.errors import RunError
from memplan.job.spec import Job

OPTIMIZERS = {
    ("adamw", "fused"): "adamw_torch_fused", ("adamw", "foreach"): "adamw_torch",
    ("adamw_8bit", None): "adamw_bnb_8bit", ("paged_adamw", None): "paged_adamw_32bit",
    ("ao_adamw_8bit", None): "adamw_torch_8bit", ("ao_adamw_4bit", None): "adamw_torch_4bit",
    ("ao_adamw_fp8", None): "adamw_torch_8bit",  # axolotl's Trainer makes it itself; a trace has its stand-in
    ("paged_adamw_8bit", None): "paged_adamw_8bit", ("lion", None): "lion_32bit", ("sgd", None): "sgd",
}  # fmt: skip
"""Names that TrainingArguments give to the job's optimizers, None standing for any kernel."""

AUTOCAST = {None: {}, "bfloat16": {"bf16": True}, "float16": {"fp16": True}}


def check_trainer(job: Job) -> None:
    """Raise RunError where transformers' Trainer, left to itself, does not do what the job asks."""
    if job.method == "npt" or job.loss_form() != "full":
        asked = "method: npt" if job.method == "npt" else f"loss: {job.loss}"
        raise RunError(
            f"transformers' Trainer (`loop: hf_trainer`) is run with the model's own loss, not with `{asked}`",
            hint="use `--set loop=memplan`",
        )
    if job.kernels != "torch":
        raise RunError(
            "transformers' Trainer (`loop: hf_trainer`) is run with transformers' own operations, not with "
            f"`kernels: {job.kernels}`",
            hint="use `--engine shape` to plan it, or `--set kernels=torch`",
        )
    if job.offload.optimizer:
        raise RunError(
            "transformers' Trainer (`loop: hf_trainer`) has no `offload.optimizer` but DeepSpeed's",
            hint="use `--set loop=memplan`, or `--set offload.optimizer=false`",
        )
    if job.offload.activations != "none":
        raise RunError(
            "`offload.activations` is of TRL's and axolotl's Trainers, which memplan runs none of",
            hint="use `memplan estimate`, which plans it, or `--set offload.activations=none`",
        )
    if _offloads(job) and not _knows_offload():
        raise RunError(
            "the Trainer of the installed transformers has no `activation_offload`",
            hint="use `--set loop=memplan`, or transformers 5.17 and later",
        )
    trainer_optimizer(job)


def _offloads(job: Job) -> bool:
    """Whether the Trainer, which switches on checkpointing of all blocks, is asked to offload their inputs."""
    return job.activation_offload and job.activation_checkpointing == "full"


def _knows_offload() -> bool:
    """Whether `activation_checkpointing_kwargs` may name `offload` (transformers, modeling_utils.py)."""
    from transformers import PreTrainedModel

    old = PreTrainedModel.gradient_checkpointing_enable
    enable = getattr(PreTrainedModel, "activation_checkpointing_enable", old)
    return "offload" in signature(enable).parameters


def trainer_optimizer(job: Job) -> str:
    """The name of the job's optimizer; raises RunError where the Trainer has none."""
    name = OPTIMIZERS.get((job.optimizer, job.optimizer_kernel)) or OPTIMIZERS.get((job.optimizer, None))
    if name is None:
        raise RunError(
            f"transformers' Trainer has no `optimizer: {job.optimizer}` with "
            f"`optimizer_kernel: {job.optimizer_kernel}`",
            hint="use `--set optimizer=adamw --set optimizer_kernel=fused`",
        )
    return name


def training_arguments(
    job: Job, folder: str, *, steps: int, use_cpu: bool, base: type | None = None, **more: Any
) -> Any:
    """
    The job's TrainingArguments for a run that only steps: nothing is saved, logged or reported.

    Args:
        folder: where the Trainer may write.
        base: a subclass of TrainingArguments to make instead.
        more: arguments that are set whatever the job says.
    """
    from transformers import TrainingArguments

    kind: Any = base or TrainingArguments
    known = {field.name for field in fields(TrainingArguments)}
    train = job.train
    options: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": job.micro_batch_size,
        "gradient_accumulation_steps": job.gradient_accumulation_steps,
        "max_steps": steps,
        "learning_rate": train.learning_rate,
        "lr_scheduler_type": "constant",
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm or 0.0,
        "optim": trainer_optimizer(job),
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": use_cpu,
        "seed": train.seed,
    }
    options |= AUTOCAST[job.autocast]
    if job.activation_checkpointing == "full":
        checkpointing = (
            "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        )
        options[checkpointing] = True
        kwargs = {"offload": True} if _offloads(job) else {}
        if job.use_reentrant:
            kwargs["use_reentrant"] = True
        if kwargs:
            options[f"{checkpointing}_kwargs"] = kwargs
    options |= more
    return kind(**{name: value for name, value in options.items() if name in known})
