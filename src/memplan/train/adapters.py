"""
LoRA adapters, made by peft without memory and filled one by one; with them, where tokens were added, the rows of these
tokens in the embeddings and in a head of its own weight.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from memplan.errors import RunError
from memplan.job.spec import Job
from memplan.tape.targets import check_copies, nothing_targeted
from memplan.tape.targets import targets as targets_layer
from memplan.train.skeleton import Skeleton, copy_shard, is_sharded
from memplan.train.tokens import first_line

ADAPTER = "default"


@contextmanager
def without_bitsandbytes() -> Iterator[None]:
    """
    peft imports bitsandbytes where it finds it, which takes longer than all else; it is of use for 4-bit layers only.
    """
    if "bitsandbytes" in sys.modules:
        yield
        return
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]
    try:
        import peft.import_utils as available

        yield
    finally:
        del sys.modules["bitsandbytes"]
        for function in (available.is_bnb_available, available.is_bnb_4bit_available):
            function.cache_clear()


def add_adapters(model: Any, job: Job, token_ids: Sequence[int] | None = None) -> Any:
    """
    The model with adapters beside its linear layers; everything else is frozen. On the meta device nothing is drawn
    yet: see `draw_adapters`.

    Args:
        token_ids: rows of the embeddings that train as well, where the job says so; None: the last ones.

    Raises:
        JobError: `lora.target_modules` names nothing that the model has, or `lora.modules_to_save` more than the
            embeddings and the head.
        RunError: peft cannot adapt what it names.
    """
    from peft import LoraConfig, get_peft_model

    _check_copies(model, job)
    lora = job.lora
    targets = lora.target_modules
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        trainable_token_indices=_trained_rows(model, job, token_ids),
        modules_to_save=list(job.modules_to_save) or None,
    )
    paths = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    try:
        adapted = get_peft_model(model, config, autocast_adapter_dtype=lora.dtype == "float32")
    except ValueError as error:
        if not any(targets_layer(job, path) for path in paths):
            raise nothing_targeted(job, paths) from error
        raise RunError(
            f"the adapters do not fit the model: {first_line(error)}",
            hint=_others(path for path in paths if path.rpartition(".")[2] not in str(error)),
        ) from error
    _refuse_unlike_linear(adapted)
    dtype = getattr(torch, lora.dtype)
    for name, parameter in adapted.named_parameters():
        is_copy = f".modules_to_save.{ADAPTER}." in name
        trained = getattr(torch, job.saved_dtype) if is_copy else dtype
        if parameter.requires_grad and parameter.dtype != trained:
            parameter.data = parameter.data.to(trained)
    return adapted


def _others(paths: Iterable[str]) -> str:
    """What to set instead: the linear layers at `paths`, by the last part of their names."""
    names = sorted({path.rpartition(".")[2] for path in paths} - {"lm_head"})
    return f"name linear layers that it can adapt: `--set lora.target_modules=[{','.join(names)}]`"


def _refuse_unlike_linear(adapted: nn.Module) -> None:
    """
    Refuse linear layers of a model's own that do something else, which peft adapts as if they did not: routers that
    return more than a tensor, and layers of groups.

    Raises:
        RunError: with the layers that can be named instead.
    """
    from peft.tuners.lora import LoraLayer

    layers = {name: layer for name, layer in adapted.named_modules() if isinstance(layer, LoraLayer)}
    reasons = {name: _unlike_linear(layer.get_base_layer()) for name, layer in layers.items()}
    unlike = {name for name, reason in reasons.items() if reason}
    if unlike:
        first = min(unlike)
        kind = type(layers[first].get_base_layer()).__name__
        raise RunError(
            f"the adapters do not fit the model: peft adapts `{first.removeprefix('base_model.model.')}`, a {kind} "
            f"that {reasons[first]}, and cannot run it",
            hint=_others(layers.keys() - unlike),
        )


def _unlike_linear(layer: nn.Module) -> str | None:
    """What a model's own kind of linear layer on meta tensors makes of one row, if it is no row; in words."""
    if not isinstance(layer, nn.Linear) or not type(layer).__module__.startswith("transformers.models."):
        return None
    if type(layer).forward is nn.Linear.forward or layer.weight.device.type != "meta":
        return None
    try:
        with torch.no_grad():
            out = layer(layer.weight.new_empty(1, layer.in_features))
    except RuntimeError:
        return "multiplies groups of rows by parts of its weight"
    return "returns more than one tensor" if isinstance(out, tuple) else None


def _check_copies(model: Any, job: Job) -> None:
    """Refuse what `lora.modules_to_save` names beside the embeddings and the head of this model."""
    if not job.modules_to_save:
        return
    names = {module: name for name, module in model.named_modules(remove_duplicate=False)}
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    is_packed, is_tied = hasattr(head, "pack_weight"), head.weight is embeddings.weight
    check_copies(job, names[embeddings], names[head], is_tied=is_tied, is_packed=is_packed)


def _trained_rows(model: Any, job: Job, token_ids: Sequence[int] | None) -> dict[str, list[int]] | None:
    """
    The rows that train, by the name of the module; a tied head follows the embeddings by itself.

    Raises:
        RunError: the head is none whose rows peft can train.
    """
    if not job.trained_tokens:
        return None
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    num_rows = embeddings.weight.shape[0]
    rows = list(range(num_rows - job.trained_tokens, num_rows) if token_ids is None else token_ids)
    if head is None or head.weight is embeddings.weight:
        return {names[embeddings]: rows}
    if type(head) is not nn.Linear or head.bias is not None:
        raise RunError(
            "the rows of `data.special_tokens` train in a head that is one linear layer without bias, not quantised",
            hint="keep `lm_head` in `quantization.skip`, or use `--set lora.train_tokens=false`",
        )
    return {names[embeddings]: rows, names[head]: rows}


def fill_token_rows(model: nn.Module, skeleton: Skeleton, device: torch.device) -> None:
    """Give the rows that train beside the adapters their values: those of the embeddings that they stand in for."""
    from peft.tuners.trainable_tokens import TrainableTokensLayer

    for layer in model.modules():
        if not isinstance(layer, TrainableTokensLayer) or layer.tied_adapter is not None:
            continue
        rows = skeleton.watched[layer.get_base_layer()]
        trained = layer.trainable_tokens_delta[ADAPTER]
        if is_sharded(trained):
            copy_shard(trained, rows)
        else:
            value = rows.to(device, trained.dtype, copy=True)
            layer.trainable_tokens_delta[ADAPTER] = nn.Parameter(value, requires_grad=True)
        original = layer.trainable_tokens_original[ADAPTER]
        layer.trainable_tokens_original[ADAPTER] = rows.to(device, original.dtype, copy=True)


def fill_copies(model: nn.Module, device: torch.device) -> None:
    """
    Give the copies of `lora.modules_to_save` the values of what they copy, which has them. Of a sharded one each rank
    copies its part, which is cut as that of the original.
    """
    from peft.utils.other import ModulesToSaveWrapper

    for wrapper in model.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper):
            continue
        original, copied = wrapper.original_module, wrapper.modules_to_save[ADAPTER]
        for name, source in original.named_parameters(recurse=False):
            trained = copied._parameters[name]
            if is_sharded(trained):
                with torch.no_grad():
                    trained.to_local().copy_(source.to_local())
            else:
                value = source.detach().to(device, trained.dtype, copy=True)
                copied._parameters[name] = nn.Parameter(value)
        for name, buffer in original.named_buffers(recurse=False):
            copied._buffers[name] = buffer.clone()


def draw_adapters(model: nn.Module, device: torch.device, seed: int) -> None:
    """
    Initialise every adapter as peft does, layer by layer, on `device`. A sharded one gets this rank's part of what a
    single process draws.
    """
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(seed)
    for layer in model.modules():
        if not isinstance(layer, LoraLayer):
            continue
        empty = [
            (part._parameters, name, parameter)
            for part in layer.modules()
            for name, parameter in part._parameters.items()
            if parameter is not None and parameter.requires_grad
        ]
        for parameters, name, parameter in empty:
            whole = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            parameters[name] = nn.Parameter(whole)
        layer.reset_lora_parameters(ADAPTER, init_lora_weights=True)
        for parameters, name, parameter in empty:
            if is_sharded(parameter):
                copy_shard(parameter, parameters[name])
                parameters[name] = parameter
