"""
From a job to the model that trains: weights, adapters or NPT blocks, attention, activation checkpointing.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from memplan.errors import ModelError, RunError
from memplan.job.spec import Job
from memplan.train.tokens import first_line

NPT_FILE = "npt.safetensors"

_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logits_scaling", "logit_scale", "logits_soft_cap")
"""Config fields of models whose logits are not simply `lm_head(hidden)`."""


@dataclass(frozen=True)
class Built:
    """A model ready to train, and the two parts of it that the loop calls."""

    model: nn.Module
    decoder: nn.Module
    """Token ids to last hidden states (batch, seq, hidden)."""
    head: nn.Module
    """Hidden states to logits (batch, seq, vocab)."""
    method: str

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimizer steps."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def base_fingerprint(self) -> str:
        """SHA-256 over names, shapes and a sample of every frozen parameter: what a checkpoint leaves out."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                flat = parameter.detach().flatten()
                sample = torch.cat([flat[:32], flat[-32:]]).float().cpu()
                digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
                digest.update(sample.numpy().tobytes())
        return digest.hexdigest()

    def save_weights(self, folder: Path) -> None:
        """What was trained, in the format that peft or transformers loads; NPT layers as safetensors."""
        model: Any = self.model
        if self.method == "lora":
            model.save_pretrained(folder, save_embedding_layers=False)
        elif self.method == "npt":
            from memplan.npt import save_npt

            save_npt(model, folder / NPT_FILE)
        else:
            model.save_pretrained(folder)

    def load_weights(self, folder: Path) -> None:
        """
        Put saved weights back into adapters or NPT layers. A full model is built from its checkpoint instead.

        Raises:
            RunError: the checkpoint does not belong to this model.
        """
        if self.method == "npt":
            from memplan.npt import load_npt

            load_npt(self.model, folder / NPT_FILE)
        elif self.method == "lora":
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            result = set_peft_model_state_dict(self.model, load_file(folder / "adapter_model.safetensors"))
            missing = [name for name in result.missing_keys if "lora_" in name]
            if missing or result.unexpected_keys:
                odd = (missing or result.unexpected_keys)[0]
                raise RunError(
                    f"the adapters in `{folder}` do not belong to this model: `{odd}` does not match"
                )


def build_model(
    job: Job,
    config: dict[str, Any],
    device: torch.device,
    *,
    weights_path: str | None,
) -> Built:
    """
    The job's model on `device`, in training mode, with gradients on what trains.

    Args:
        job: the job as checked by `launch`.
        config: the model's `config.json`.
        device: where the weights go; random ones are drawn there.
        weights_path: local folder or hub id of pretrained weights; None draws random ones.

    Raises:
        ModelError: the weights cannot be loaded.
        RunError: a combination that this trainer cannot run.
    """
    with _quiet():
        return _build(job, config, device, weights_path)


def _build(job: Job, config: dict[str, Any], device: torch.device, weights_path: str | None) -> Built:
    if weights_path is None:
        model = _random(job, config, device)
    else:
        model = _pretrained(job, weights_path, device)
    model.config.use_cache = False
    decoder = getattr(model, model.base_model_prefix)
    trained = _prepare(job, model)
    # After `_prepare`: the head may have got an adapter.
    built = Built(trained, decoder, model.get_output_embeddings(), job.method)
    if job.method != "npt":
        _check_head(job, model.config, built.head)
    if not built.trainable:
        raise RunError("nothing in the model trains", hint="check `lora.target_modules` or `npt.layers`")
    return built


def _check_head(job: Job, config: Any, head: nn.Module) -> None:
    """The loss is taken on `head(hidden)`, in chunks on its weight: refuse models where that is not all."""
    transform = next(
        (name for name in _LOGIT_TRANSFORMS if getattr(config, name, None) not in (None, 1, 1.0)), None
    )
    if transform is not None:
        raise RunError(
            f"the model's config sets `{transform}`, and the loss here takes logits as the head gives them",
            hint="train it with another tool, or with `method: npt`, which needs no logits",
        )
    if job.loss != "full" and (not isinstance(head, nn.Linear) or head.bias is not None):
        raise RunError(
            f"`loss: {job.loss}` needs an output head that is one linear layer without bias or adapter",
            hint="use `--set loss=full`, or leave the head out of `lora.target_modules`",
        )


def _random(job: Job, config: dict[str, Any], device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config.get("model_type")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"the installed transformers knows no model type `{model_type}`",
            hint="pip install --upgrade transformers",
        )
    resolved = CONFIG_MAPPING[model_type].from_dict(config)
    torch.manual_seed(derive_seed(job.train.seed, "weights"))
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                resolved, dtype=getattr(torch, job.dtype), attn_implementation=job.attention
            )
    except (ValueError, ImportError) as error:
        raise ModelError(
            f"transformers cannot build `{job.model}`: {first_line(error)}",
            hint="another attention may help: `--set attention=eager`",
        ) from error
    _materialise(model, device)
    model.init_weights()
    return model


def _materialise(model: nn.Module, device: torch.device) -> None:
    """
    Give every meta tensor memory on `device`, tied ones once.

    Built on the device at once, a tied head would be made before it is tied: a second embedding for a moment.
    """
    placed: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if tensor not in placed:
                    empty = torch.empty_like(tensor, device=device)
                    placed[tensor] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
                tensors[name] = placed[tensor]


def _pretrained(job: Job, path: str, device: torch.device) -> Any:
    from transformers import AutoModelForCausalLM

    options: dict[str, Any] = {"dtype": getattr(torch, job.dtype), "attn_implementation": job.attention}
    if device.type == "cuda" and job.load.ram_efficient:
        options["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(path, **options)
        return model if "device_map" in options else model.to(device)
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"the weights of `{path}` cannot be loaded: {first_line(error)}",
            hint="name a local folder with the weights, or use `--set weights=random` to run without any",
        ) from error


def _prepare(job: Job, model: Any) -> nn.Module:
    """Freeze and unfreeze, add what trains, switch on checkpointing."""
    if job.method == "npt":
        from memplan.npt import convert

        # The original blocks are the teacher, and a teacher with dropout is a noisy one.
        model.eval()
        convert(model, job.npt, seed=derive_seed(job.train.seed, "npt"))
        return model
    trained = _add_adapters(job, model) if job.method == "lora" else model
    if job.activation_checkpointing != "none":
        # After the adapters: peft makes the embeddings require gradients where it finds checkpointing on.
        enable_activation_checkpointing(model, every_second=job.activation_checkpointing == "selective")
    return trained.train()


def _add_adapters(job: Job, model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    lora = job.lora
    targets = lora.target_modules
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(derive_seed(job.train.seed, "adapters"))
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=lora.dtype == "float32")
    except ValueError as error:
        raise RunError(
            f"the adapters do not fit the model: {first_line(error)}",
            hint="name linear layers of the model, or `all-linear`",
        ) from error
    dtype = getattr(torch, lora.dtype)
    for parameter in adapted.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return adapted


def enable_activation_checkpointing(model: Any, *, every_second: bool) -> None:
    """
    Recompute blocks in backward: non-reentrant, with the random state of forward, all blocks or 1, 3, 5, ...

    transformers 5 renamed the method and still has both names. It also makes the embeddings' output require
    gradients, which re-entrant checkpointing needs and this kind does not: undone, so that frozen blocks
    below the first adapter save nothing.
    """
    arguments = {"use_reentrant": False, "preserve_rng_state": True}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(arguments)
    model.disable_input_require_grads()
    if every_second:
        from transformers.modeling_layers import GradientCheckpointingLayer

        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for index, block in enumerate(blocks):
            block.gradient_checkpointing = index % 2 == 1


def derive_seed(*parts: object) -> int:
    """A seed below 2**63 that depends on all parts, the same in every process."""
    text = json.dumps([str(part) for part in parts])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, loading reports and deprecations of libraries; errors still come as exceptions."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*")
            yield
    finally:
        logging.set_verbosity(verbosity)
