"""
The job's model on meta tensors: what `memplan.train.build` would make, cut to the blocks that have to be traced.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from memplan.budget.host_sizes import HostSizes
from memplan.errors import NoSuchAttention, RunError, TraceError, UnknownModel
from memplan.job.spec import Job
from memplan.job.targets import is_by_block, matches
from memplan.model.config import class_name_of, is_masked_lm, refuse_other_head, stored_dtype
from memplan.model.stored import read_stored
from memplan.tape.encoders import refuse_for_encoder
from memplan.tape.repeat import Selection, choose_layers
from memplan.tape.stored import refuse_unlike_stored
from memplan.tape.vocabulary import resized_config
from memplan.tracing.gptq import adapted_by_peft, replace_with_gptq
from memplan.train.adapters import without_bitsandbytes
from memplan.train.build import Built, _prepare, check_head, decoder_of
from memplan.train.group import Group
from memplan.train.meta_model import as_transformers, auto_class, meta_model
from memplan.train.offload import Mover
from memplan.train.parallel import Step, is_sharded, shard

META = torch.device("meta")


@dataclass(frozen=True)
class MetaModel:
    """A model to trace."""

    built: Built
    root: Step | None
    """What FSDP was applied to; None where every rank has all of the model, or accelerate cuts it later."""
    blocks: nn.ModuleList | None
    selection: Selection
    num_layers: int
    num_parameters: int
    """Of the whole base model."""
    largest_parameter: int
    """Elements of its largest tensor."""
    embedding: int
    """Elements of its input embeddings."""
    class_name: str
    """The class of transformers that it is of."""
    stacks: tuple[int, int]
    """Elements of the tensors that loading puts together from several, and of the largest one."""
    stored_dtype: str | None
    """dtype of the checkpoint, as its config says."""
    is_stored: bool = False
    """Its checkpoint stores the weights of linear layers quantised."""

    def sizes(self, trainable: int) -> HostSizes:
        """What host memory depends on; `trainable`: elements that train."""
        config = self.built.model.config.get_text_config()
        return HostSizes(
            base=self.num_parameters,
            trainable=trainable,
            largest=self.largest_parameter,
            embedding=self.embedding,
            hidden_size=config.hidden_size,
            num_layers=self.num_layers,
            packed=self._of_whole(_num_packed),
            copied=self._of_whole(_num_copied),
            stacked=self.stacks[0],
            largest_stack=self.stacks[1],
            stored_dtype=self.stored_dtype,
            is_stored_packed=self.is_stored,
        )

    def multiplicity(self) -> dict[int, int]:
        """How many blocks a block at hand stands for, itself included, where that is not one."""
        stands = Counter(self.selection.representative(layer) for layer in range(self.num_layers))
        return {layer: count for layer, count in stands.items() if count > 1}

    def has_experts(self) -> bool:
        """Whether a token may be sent to a part of the weights alone."""
        return names_experts(self.built.model)

    def count_added(self) -> int:
        """Trainable parameters of the whole model, from those of the blocks at hand."""
        return self._of_whole(_trainable)

    def _of_whole(self, count: Callable[[nn.Module], int]) -> int:
        return _of_whole(self.built.model, self.blocks, self.selection, self.num_layers, count)


def _of_whole(
    model: nn.Module,
    blocks: nn.ModuleList | None,
    selection: Selection,
    num_layers: int,
    count: Callable[[nn.Module], int],
) -> int:
    """A count of the whole model, from those of the blocks at hand."""
    inside = [count(block) for block in blocks or ()]
    outside = count(model) - sum(inside)
    position = {layer: index for index, layer in enumerate(selection.layers)}
    return outside + sum(inside[position[selection.representative(layer)]] for layer in range(num_layers))


def build_meta(
    job: Job, config: dict[str, Any], group: Group, *, mover: Mover | None = None, whole: bool = False
) -> MetaModel:
    """
    The model of a job, with what trains added, on meta tensors.

    Args:
        config: the model's `config.json`.
        group: the ranks of the job, on meta devices.
        mover: what offloads the inputs of checkpointed blocks, if the job offloads them.
        whole: trace every block instead of a few that stand for the others.

    Raises:
        UnknownModel: the installed transformers cannot build it, it has no language model's head, or the storage of
            its weights is not planned.
        NoSuchAttention: it can, with another attention.
        TraceError: the loop is ours, which does not train it.
        JobError: it is an encoder, and the job asks for what only decoders have; or its weights are stored otherwise
            than the job says.
    """
    refuse_other_head(config, job.model)
    if is_masked_lm(config):
        refuse_for_encoder(job)
    stored = read_stored(config, job.model)
    refuse_unlike_stored(job, stored)
    model = _base(job, resized_config(job, config))
    name = type(model).__name__
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    largest = max(parameter.numel() for parameter in model.parameters())
    embedding = model.get_input_embeddings().weight.numel()
    blocks = find_blocks(model)
    if blocks is None:
        selection = Selection((), {})
        num_layers = 0
    else:
        num_layers = len(blocks)
        selection = _select(job, blocks, whole=whole or _targets_differ(job, model, blocks))
        _cut(model, blocks, selection)
        job = _renumber(job, num_layers, selection)
    is_stack = _stacks(model)
    largest_stack = max(
        (parameter.numel() for name, parameter in model.named_parameters() if is_stack(name)), default=0
    )
    stacked = _of_whole(model, blocks, selection, num_layers, lambda module: _num_stacked(module, is_stack))
    decoder = decoder_of(model)
    alone = job.method == "lora" or job.has_gptq_base
    if job.has_gptq_base:
        replace_with_gptq(blocks, job)
    elif job.has_quantized_base:
        from memplan.train.quantize import replace_linears

        replace_linears(model, job)
    with (
        META,
        without_bitsandbytes() if alone else nullcontext(),
        adapted_by_peft() if job.has_gptq_base else nullcontext(),
    ):
        # In the order of memplan.train.build: NPT blocks are made when the rest has been cut.
        trained = model if job.method == "npt" else _prepare(job, model, mover)
        built = Built.of(job, model, trained, decoder)
        _check_loss(job, built)
        is_cut = is_sharded(job) and job.loop != "hf_trainer"
        if is_cut and job.method == "qlora" and job.quantization.kbit_preparation:
            from memplan.train.quantize import prepare_kbit

            prepare_kbit(trained)
        root = _cut_to_shards(job, built, group) if is_cut else None
        if job.method == "npt":
            _prepare(job, model)
    return MetaModel(
        built, root, blocks, selection, num_layers, num_parameters, largest, embedding, name,
        (stacked, largest_stack), stored_dtype(config), is_stored=stored is not None,
    )  # fmt: skip


def _trainable(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _stacks(model: nn.Module) -> Callable[[str], bool]:
    """Whether transformers puts a tensor of this name together from several of a checkpoint."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import WeightConverter

    found: Any = conversion_mapping.get_model_conversion_mapping
    targets = [
        pattern.replace("\\.", ".").strip("^$")
        for conversion in found(model)
        if isinstance(conversion, WeightConverter)
        for pattern in conversion.target_patterns
    ]
    return lambda name: any(target in f".{name}" for target in targets)


def _num_stacked(module: nn.Module, is_stack: Callable[[str], bool]) -> int:
    return sum(parameter.numel() for name, parameter in module.named_parameters() if is_stack(name))


def _num_copied(module: nn.Module) -> int:
    return sum(
        parameter.numel() for name, parameter in module.named_parameters() if ".modules_to_save." in name
    )


def _num_packed(module: nn.Module) -> int:
    layers: Iterator[Any] = (layer for layer in module.modules() if hasattr(layer, "pack_weight"))
    return sum(layer.in_features * layer.out_features for layer in layers)


def names_experts(model: nn.Module) -> bool:
    """Whether modules of a model, or their classes, are called experts; how many of them a token sees is not told."""
    return any(
        "expert" in f"{name} {type(module).__name__}".lower() for name, module in model.named_modules()
    )


def _cut_to_shards(job: Job, built: Built, group: Group) -> Step:
    """The root of the units that FSDP gathers."""
    root = Step(job, built, META.type)
    shard(job, built, root, group)
    return root


def _base(job: Job, config: dict[str, Any]) -> Any:
    from transformers import initialization

    resolved = as_transformers(config)
    _check_class(job, config, resolved)
    with initialization.no_init_weights(), _flash_attention_allowed():
        model = meta_model(job.model, config, resolved, dtype=job.dtype, attention=job.attention)
    model.tie_weights()
    return model


def _check_class(job: Job, config: dict[str, Any], resolved: Any) -> None:
    """Refuse what has no language-model head over its own hidden states, or not with the job's attention."""
    models, named = auto_class(config)._model_mapping, class_name_of(config) or ""
    elsewhere = "`memplan.trace` in Python traces a training step of any model"
    if type(resolved) not in models:
        raise UnknownModel(
            f"transformers has no causal language model of the type `{resolved.model_type}`, and jobs train those",
            hint=elsewhere,
        )
    if getattr(resolved, "is_encoder_decoder", False) and not named.endswith("ForCausalLM"):
        raise UnknownModel(
            f"`{job.model}` is an encoder with a decoder, and jobs train decoders alone", hint=elsewhere
        )
    built = models[type(resolved)]
    flag = {"sdpa": "_supports_sdpa", "flash_attention_2": "_supports_flash_attn"}.get(job.attention)
    if flag is not None and not isinstance(built, tuple) and not getattr(built, flag, True):
        raise NoSuchAttention(
            f"transformers' {built.__name__} has no `attention: {job.attention}`",
            hint="use `--set attention=eager`",
        )


def _check_loss(job: Job, built: Built) -> None:
    """Our own loop takes the loss from the head's logits, which is not what every model makes of them."""
    if job.loop != "memplan" or job.method == "npt":
        return
    try:
        check_head(built, built.model.config)
    except RunError as error:
        raise TraceError(
            f"`memplan train` cannot train this job: {error.message}",
            hint="`--set loop=hf_trainer` plans it as transformers' Trainer runs it",
        ) from error


@contextmanager
def _flash_attention_allowed() -> Iterator[None]:
    """A model may have flash-attn's attention without the package: what it allocates stands in (packages.py)."""
    from transformers import PreTrainedModel

    original = PreTrainedModel._check_and_adjust_attn_implementation

    def check(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation != "flash_attention_2":
            return original(self, attn_implementation, *args, **kwargs)
        self._flash_attn_can_dispatch(2, is_init_check=True)
        return attn_implementation

    with (
        patch.object(PreTrainedModel, "_check_and_adjust_attn_implementation", check),
        patch.object(PreTrainedModel, "_flash_attn_import_error", lambda *_, **__: None),
    ):
        yield


def find_blocks(model: nn.Module) -> nn.ModuleList | None:
    """The longest list of modules in a model that is not inside another list: its repeated blocks."""
    longest = None
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            inside |= set(module.modules())
            if longest is None or len(module) > len(longest):
                longest = module
    return longest


def _select(job: Job, blocks: nn.ModuleList, *, whole: bool) -> Selection:
    if whole:
        return Selection(tuple(range(len(blocks))), {})
    from memplan.npt.layers import layer_indices

    converted = frozenset(layer_indices(job.npt.layers, len(blocks))) if job.method == "npt" else frozenset()
    second = job.activation_checkpointing == "selective"
    kinds: list[Hashable] = [
        (_signature(block), index in converted, second and index % 2 == 1)
        for index, block in enumerate(blocks)
    ]
    return choose_layers(kinds)


def _targets_differ(job: Job, model: nn.Module, blocks: nn.ModuleList) -> bool:
    """Whether not all blocks get the same adapters; peft finds those of one block by its number."""
    wanted = job.lora.target_modules
    if job.method not in ("lora", "qlora") or not is_by_block(wanted):
        return False
    prefix = next(name for name, module in model.named_modules() if module is blocks)
    chosen = [
        [name for name, _ in block.named_modules() if matches(wanted, f"{prefix}.{layer}.{name}")]
        for layer, block in enumerate(blocks)
    ]
    return any(names != chosen[0] for names in chosen)


def _signature(block: nn.Module) -> Hashable:
    """What makes blocks alike: their modules, parameters, and plain settings such as a sliding window."""
    modules = tuple(
        (
            name,
            type(module).__name__,
            tuple(
                (key, value)
                for key, value in sorted(vars(module).items())
                if key not in ("layer_idx", "training")
                and isinstance(value, (str, int, float, bool, type(None)))
            ),
        )
        for name, module in block.named_modules()
    )
    return modules, tuple((name, tuple(parameter.shape)) for name, parameter in block.named_parameters())


def _cut(model: Any, blocks: nn.ModuleList, selection: Selection) -> None:
    """Leave only the selected blocks in the model, numbered anew, and make its config say so."""
    kept = [blocks[index] for index in selection.layers]
    num_layers = len(blocks)
    for index, block in enumerate(kept):
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = index
    blocks._modules = {str(index): block for index, block in enumerate(kept)}
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in configs.values():
        for key in ("num_hidden_layers", "n_layer", "num_layers"):
            if getattr(config, key, None) == num_layers:
                setattr(config, key, len(kept))
        for key, value in list(vars(config).items()):
            if isinstance(value, list) and len(value) == num_layers:
                setattr(config, key, [value[index] for index in selection.layers])


def _renumber(job: Job, num_layers: int, selection: Selection) -> Job:
    """The job with NPT layers counted as the cut model counts them."""
    if job.method != "npt":
        return job
    from memplan.npt.layers import layer_indices

    converted = set(layer_indices(job.npt.layers, num_layers))
    positions = tuple(index for index, layer in enumerate(selection.layers) if layer in converted)
    return replace(job, npt=replace(job.npt, layers=positions))
