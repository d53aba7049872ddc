"""
From a job to the model that trains: weights, adapters or NPT blocks, attention, activation checkpointing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from memplan.errors import ModelError, RunError, UnknownModel
from memplan.job.spec import Job
from memplan.train.adapters import (
    add_adapters,
    draw_adapters,
    fill_copies,
    fill_token_rows,
    without_bitsandbytes,
)
from memplan.train.meta_model import as_transformers, meta_model
from memplan.train.offload import Mover, make_mover, offload_inputs
from memplan.train.seeds import derive_seed as derive_seed
from memplan.train.skeleton import Skeleton
from memplan.train.speech import say
from memplan.train.stream import find_files, load_streamed
from memplan.train.tokens import first_line

NPT_FILE = "npt.safetensors"

_LOGIT_TRANSFORMS = (
    "logits_scaling", "logit_scale", "logits_soft_cap", "output_logit_soft_cap", "lm_head_multiplier",
    "logits_mup_width_multiplier",
)  # fmt: skip
"""
Config fields of models whose logits are neither `lm_head(hidden)` nor Gemma's softcapping of that, nor Granite's
division: others multiply by what they call `logits_scaling`.
"""


@dataclass(frozen=True)
class Built:
    """A model ready to train, and the two parts of it that the loop calls."""

    model: nn.Module
    decoder: nn.Module
    """Token ids to last hidden states (batch, seq, hidden)."""
    head: nn.Module
    """Hidden states to logits (batch, seq, vocab)."""
    method: str
    logit_softcap: float | None = None
    """c of `c * tanh(logits / c)`, which the model's own `forward` makes of the logits; None for none."""
    logits_scaling: float | None = None
    """What Granite's own `forward` divides the logits by; None for none."""
    loss_form: str = "full"
    """`full`, `chunked` or `fused`."""
    shifts: bool = True
    """Labels are of the next token; else, for masked tokens, of the token itself."""

    @classmethod
    def of(cls, job: Job, model: Any, trained: nn.Module, decoder: nn.Module) -> Built:
        """
        Of transformers' `model`, once it has its adapters: the head may have got one. `trained` is what holds both.
        The loss is that of our own loop, which may train a job that is planned for another.
        """
        masked = type(model).__name__.endswith("ForMaskedLM")
        head = _masked_lm_head(job, model) if masked else model.get_output_embeddings()
        config = model.config.get_text_config(decoder=True)
        softcap = getattr(config, "final_logit_softcapping", None)
        scaling = config.logits_scaling if _divides_logits(config) else None
        form = job.replace(loop="memplan").loss_form(plain_head=is_plain(head))
        return cls(trained, decoder, head, job.method, softcap, scaling, form, shifts=not masked)

    @property
    def trainable(self) -> list[nn.Parameter]:
        """The parameters that the optimizer steps."""
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def save_weights(self, folder: Path) -> None:
        """What was trained, in the format that peft or transformers loads; NPT layers as safetensors."""
        model: Any = self.model
        if self.method in ("lora", "qlora"):
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
        elif self.method in ("lora", "qlora"):
            from peft import set_peft_model_state_dict
            from safetensors.torch import load_file

            tensors = load_file(folder / "adapter_model.safetensors")
            try:
                result = set_peft_model_state_dict(self.model, tensors)
                missing = [name for name in result.missing_keys if "lora_" in name]
                odd = next(iter([*missing, *result.unexpected_keys]), None)
            except KeyError as error:  # a copy of `lora.modules_to_save` or rows of tokens
                odd = error.args[0]
            if odd is not None:
                raise RunError(
                    f"the adapters in `{folder}` do not belong to this model: `{odd}` does not match"
                )


def build_model(
    job: Job,
    config: dict[str, Any],
    device: torch.device,
    *,
    weights_path: str | None,
    shard: Callable[[Built], None] | None = None,
    token_ids: Sequence[int] | None = None,
) -> Built:
    """
    The job's model on `device`, in training mode, with gradients on what trains.

    Args:
        job: the job as checked by `launch`.
        config: the model's `config.json`.
        device: where the weights go; random ones are drawn there.
        weights_path: local folder or hub id of pretrained weights; None draws random ones.
        shard: applies FSDP's `fully_shard` to a model whose tensors have no memory yet; each rank then fills its part.
        token_ids: ids of the job's special tokens; None: the last ones. The config counts their rows already.

    Raises:
        ModelError: transformers cannot build the model, or the weights cannot be loaded.
        UnknownModel: the installed transformers has no such model.
        RunError: a combination that this trainer cannot run.
    """
    with _quiet():
        return _build(job, config, device, weights_path, shard, token_ids)


def _build(
    job: Job,
    config: dict[str, Any],
    device: torch.device,
    weights_path: str | None,
    shard: Callable[[Built], None] | None,
    token_ids: Sequence[int] | None,
) -> Built:
    model = _model(job, config)
    if job.has_quantized_base:
        from memplan.train.quantize import replace_linears

        replace_linears(model, job)
    if job.trained_tokens and token_ids is None:
        rows = model.get_input_embeddings().weight.shape[0]
        token_ids = range(rows - job.trained_tokens, rows)
    skeleton = Skeleton(
        model,
        device,
        grows=bool(job.data.special_tokens),
        watch=token_ids if job.trained_tokens and token_ids is not None else (),
    )
    decoder = decoder_of(model)
    trained = _prepare(job, model, make_mover(device), token_ids) if job.method != "npt" else model
    built = Built.of(job, model, trained, decoder)
    if job.method != "npt":
        check_head(built, model.config)
    if shard is not None:
        shard(built)
        if job.method == "qlora":
            from memplan.train.quantize import probe_layers

            probe_layers(trained)
        trained.to_empty(device=torch.device("cpu") if job.offload.params else device)
    if weights_path is None:
        skeleton.draw(job.train.seed)
    else:
        _load(job, skeleton, weights_path)
    skeleton.finish()
    if job.method == "npt":
        _prepare(job, model)
    elif job.method != "full":
        _finish_adapted(job, trained, skeleton, device)
    if not built.trainable:
        raise RunError("nothing in the model trains", hint="check `lora.target_modules` or `npt.layers`")
    return built


def is_plain(head: nn.Module) -> bool:
    """Whether a head is one linear layer without bias or adapter, not quantised; ask before it is sharded."""
    return type(head) is nn.Linear and head.bias is None


def _masked_lm_head(job: Job, model: Any) -> nn.Module:
    """
    The module that makes logits of an encoder's hidden states: `cls` of BERT, `lm_head` of RoBERTa.

    Raises:
        UnknownModel: our own loop would call it, and its parts are not in one module, as with DistilBERT.
    """
    projection = model.get_output_embeddings()
    name = next((name for name, module in model.named_modules() if module is projection), "")
    outermost, _, rest = name.partition(".")
    if not rest and (job.loop == "memplan" or not name):
        raise UnknownModel(
            f"`loop: memplan` calls a model's head, and that of {type(model).__name__} is no module of its own",
            hint="use `--set loop=script` or `--set loop=hf_trainer`, which call the whole model",
        )
    head: nn.Module = getattr(model, outermost)
    return head


def decoder_of(model: Any) -> nn.Module:
    """What turns token ids into hidden states. The text parts of multimodal models keep the prefix of the whole."""
    embeddings = model.get_input_embeddings()
    decoder: nn.Module = getattr(model, model.base_model_prefix, None) or next(
        child for child in model.children() if embeddings in child.modules()
    )
    return decoder


def _divides_logits(config: Any) -> bool:
    return bool(config.model_type == "granite")


def check_head(built: Built, config: Any) -> None:
    """
    The loss is taken on `head(hidden)`, in chunks on its weight: refuse models where that is not all.

    Raises:
        RunError: the config changes logits, or the model has layers that are neither in its decoder nor in its head.
    """
    config = config.get_text_config(decoder=True)
    transform = next(
        (name for name in _LOGIT_TRANSFORMS if getattr(config, name, None) not in (None, 1, 1.0)), None
    )
    if transform is not None and not _divides_logits(config):
        raise RunError(
            f"the model's config sets `{transform}`, and the loss here takes logits as the head gives them",
            hint="train it with another tool, or with `method: npt`, which needs no logits",
        )
    parts = {id(item) for part in (built.decoder, built.head) for item in part.parameters()}
    left_out = next((name for name, item in built.model.named_parameters() if id(item) not in parts), None)
    if left_out is not None:
        layer = left_out.rpartition(".")[0].removeprefix("base_model.model.")
        raise RunError(
            f"the model's `{layer}` is neither in its decoder nor in its head, and the loss here takes logits as the "
            "head gives them of what the decoder gives",
            hint="train it with another tool, or with `method: npt`, which needs no logits",
        )
    head: Any = built.head
    if hasattr(head, "token_adapter"):  # what asks for its weight gets it with the rows that train
        head = head.token_adapter.get_base_layer()
    if hasattr(head, "modules_to_save"):  # what asks for its weight gets that of the copy which trains
        head = head.modules_to_save["default"]
    if built.loss_form != "full" and not is_plain(head):
        raise RunError(
            f"`loss: {built.loss_form}` needs an output head that is one linear layer without bias or adapter, "
            "not quantised",
            hint="use `--set loss=full`, or keep `lm_head` out of `lora.target_modules` and in `quantization.skip`",
        )


def _model(job: Job, config: dict[str, Any]) -> Any:
    """
    The model as transformers builds it, without memory. Built on the device at once, it would have a second embedding
    for a moment, before its head is tied.
    """
    resolved = as_transformers(config)
    resolved._name_or_path = job.model  # what peft writes into adapter_config.json
    model = meta_model(job.model, config, resolved, dtype=job.dtype, attention=job.attention)
    model.config.use_cache = False
    return model


def _load(job: Job, skeleton: Skeleton, source: str) -> None:
    """
    Fill the model from `source`, a folder or hub id: streamed, or from a copy of the model in RAM if the job says
    so or the weights are in files that cannot be streamed.
    """
    try:
        files = find_files(source) if job.load.ram_efficient else []
        if files:
            load_streamed(skeleton.model, skeleton.slots, files, skeleton.place)
            return
        if job.load.ram_efficient:
            say(f"note: `{source}` has no safetensors files, so the whole model is built in RAM first")
        from transformers import AutoModelForCausalLM

        whole = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, job.dtype))
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(
            f"the weights of `{source}` cannot be loaded: {first_line(error)}",
            hint="name a local folder with the weights, or use `--set weights=random` to run without any",
        ) from error
    for name, tensor in whole.state_dict().items():
        skeleton.place(name, tensor)


def _prepare(
    job: Job, model: Any, mover: Mover | None = None, token_ids: Sequence[int] | None = None
) -> nn.Module:
    """
    Freeze and unfreeze, add what trains, switch on checkpointing, and with a `mover` the offload of its inputs.
    Adapters of a model without memory have none either.
    """
    if job.method == "npt":
        from memplan.npt import convert

        # The original blocks are the teacher, and a teacher with dropout is a noisy one.
        model.eval()
        convert(model, job.npt, seed=derive_seed(job.train.seed, "npt"))
        return model
    trained: Any = model
    if job.method in ("lora", "qlora"):
        with without_bitsandbytes() if job.method == "lora" else nullcontext():
            trained = add_adapters(model, job, token_ids)
    if job.activation_checkpointing != "none":
        # After the adapters: peft makes the embeddings require gradients where it finds checkpointing on.
        enable_activation_checkpointing(
            model,
            every_second=job.activation_checkpointing == "selective",
            use_reentrant=job.use_reentrant and job.loop != "memplan",
        )
        if job.activation_offload and mover is not None:
            offload_inputs(model, mover)
    return trained.train()


def _finish_adapted(job: Job, model: nn.Module, skeleton: Skeleton, device: torch.device) -> None:
    """The base is there: what is done to it, and the adapters' values."""
    if job.method == "qlora" and job.quantization.kbit_preparation:
        from memplan.train.quantize import prepare_kbit

        prepare_kbit(model)
    if job.trained_tokens:
        fill_token_rows(model, skeleton, device)
    if job.modules_to_save:
        fill_copies(model, device)
    draw_adapters(model, device, derive_seed(job.train.seed, "adapters"))


def enable_activation_checkpointing(model: Any, *, every_second: bool, use_reentrant: bool = False) -> None:
    """
    Recompute blocks in backward, with the random state of forward, all blocks or 1, 3, 5, ...; reentrant only where
    another loop is traced.

    transformers 5 renamed the method and still has both names. It also makes the embeddings' output require
    gradients, which re-entrant checkpointing needs and this kind does not: undone, so that frozen blocks
    below the first adapter save nothing.

    Raises:
        RunError: the model's class has none.
    """
    if not model.supports_gradient_checkpointing:
        raise RunError(
            f"transformers' {type(model).__name__} has no activation checkpointing",
            hint="use `--set activation_checkpointing=none`",
        )
    arguments = {"use_reentrant": use_reentrant, "preserve_rng_state": True}
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(arguments)
    model.disable_input_require_grads()
    if every_second:
        from transformers.modeling_layers import GradientCheckpointingLayer

        blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for index, block in enumerate(blocks):
            block.gradient_checkpointing = index % 2 == 1


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
            warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|rank_pattern|alpha_pattern).*")
            # Copies of tied embeddings and heads: what peft says of merging them, `memplan merge` does.
            warnings.filterwarnings("ignore", message=".*tie_word_embeddings.*")
            yield
    finally:
        logging.set_verbosity(verbosity)
