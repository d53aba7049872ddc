"""What is read off a Trainer's objects, and what a job has no words for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer

from hf.tiny_trainers import LENGTH, arguments, collate, config, lora, model, rows, trainer
from memplan.errors import DataError, JobError, TraceError, UnknownModel
from memplan.hf import MemplanCallback, preflight
from memplan.hf.batch import largest_batch
from memplan.hf.losses import read_liger
from memplan.hf.reading import Reading, read_arguments, read_environment, read_model
from memplan.units import GiB

pytestmark = pytest.mark.filterwarnings("ignore")


def test_arguments_and_a_config_are_enough(tmp_path: Path) -> None:
    """The plan of a run that is still to be built is that of its Trainer."""
    settings = {"bf16": True, "gradient_checkpointing": True, "optim": "sgd", "weight_decay": 0.1}
    before = preflight(arguments(tmp_path, **settings), config(dtype="float32"), max_seq_len=LENGTH)
    built = preflight(trainer(tmp_path, **settings))
    assert before.peak_bytes == built.peak_bytes
    job = built.result.job
    assert job is not None and (job.micro_batch_size, job.max_seq_len, job.method) == (2, LENGTH, "full")
    assert (job.autocast, job.optimizer, job.optimizer_kernel) == ("bfloat16", "sgd", "loop")
    assert job.activation_checkpointing == "full" and job.train.weight_decay == 0.1


def test_ligers_kernels_are_read(tmp_path: Path) -> None:
    """Its loss where it has one for the model, and its other kernels where all of them are asked for."""
    given = arguments(tmp_path, use_liger_kernel=True)
    plan = preflight(given, config(dtype="float32"), max_seq_len=LENGTH, gpu="24GB")
    assert plan.result.job is not None and plan.result.job.loss == "fused"
    assert plan.result.job.kernels == "liger"

    given.liger_kernel_config = {"fused_linear_cross_entropy": False, "rope": False}
    plan = preflight(given, config(dtype="float32"), max_seq_len=LENGTH, gpu="24GB")
    assert plan.result.job is not None and (plan.result.job.loss, plan.result.job.kernels) == (
        "auto",
        "torch",
    )
    assert any("Liger's other kernels" in note for note in plan.notes)

    reading = Reading()
    read_liger(reading, arguments(tmp_path, use_liger_kernel=True), "gpt2")
    assert reading.unknown == ["`use_liger_kernel` with a model of type `gpt2`"]


def test_adapters_that_are_still_to_come(tmp_path: Path) -> None:
    adapters = lora(target_modules=["q_proj", "v_proj"], lora_alpha=4)
    with torch.device("meta"):
        bare = model()
    before = preflight(arguments(tmp_path), bare, peft_config=adapters, max_seq_len=LENGTH)
    built = preflight(trainer(tmp_path, model(adapters)))
    assert before.peak_bytes == built.peak_bytes
    assert built.result.job is not None and built.result.job.lora.target_modules == ("q_proj", "v_proj")


def test_against_a_card(tmp_path: Path) -> None:
    plan = preflight(arguments(tmp_path), config(dtype="float32"), max_seq_len=LENGTH, gpu="24GB")
    assert plan.fits and plan.need_bytes > plan.peak_bytes
    assert plan.lines()[0].startswith("memplan: fits: needs ")
    assert "planned as on CUDA, not on cpu" in plan.lines()[1]


def test_against_the_gpu_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free, what this process holds, and its context, which is part of the need."""
    given = arguments(tmp_path)
    monkeypatch.setattr(type(given), "device", torch.device("cuda", 0))
    cuda = {
        "is_available": True, "get_device_name": "NVIDIA H100 80GB HBM3",
        "mem_get_info": (30 * GiB, 79 * GiB), "memory_reserved": 2 * GiB,
    }  # fmt: skip
    for name, value in cuda.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    plan = preflight(given, config(dtype="float32"), max_seq_len=LENGTH)
    capacity = plan.result.capacity
    assert plan.fits and capacity is not None and plan.result.job is not None
    assert capacity.usable_bytes == 32 * GiB + plan.result.peak.non_torch_bytes
    assert capacity.used_by_others_bytes == 79 * GiB - capacity.usable_bytes
    assert capacity.gpu in plan.lines()[0] and "H100" in str(plan.result.job.gpu)


def test_flash_attention_is_traced_as_it_is_planned(tmp_path: Path) -> None:
    run = trainer(tmp_path, model(hidden_size=256).bfloat16())  # heads of 64
    run.model.config._attn_implementation = "flash_attention_2"
    shape, trace = (preflight(run, gpu="24GB", engine=engine) for engine in ("shape", "trace"))
    assert shape.peak_bytes == pytest.approx(trace.peak_bytes, rel=0.001)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"optim": "adafactor"}, "Adafactor"),
        ({"label_smoothing_factor": 0.1}, "`label_smoothing_factor`"),
        ({"neftune_noise_alpha": 5.0}, "`neftune_noise_alpha`"),
        ({"optim_args": "amsgrad=True"}, "`optim_args`"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}},
            "`selective: True`",
        ),
    ],
)
def test_arguments_that_a_job_has_no_words_for(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    reading = Reading()
    read_arguments(reading, arguments(tmp_path, **settings), device="cuda")
    assert words in " ".join(reading.unknown)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: model(lora(use_dora=True)), "`use_dora: True`"),
        (
            lambda: model(lora(modules_to_save=["lm_head"], ensure_weight_tying=True)),
            "`ensure_weight_tying: True`",
        ),
        (lambda: model(lora(target_modules=r".*layers\.1\..*q_proj")), "other parameters"),
        (lambda: model(lora(rank_pattern={"q_proj": 4})), "`rank_pattern"),
        (lambda: nn.Linear(2, 2), "the model Linear"),
    ],
)
def test_models_that_a_job_has_no_words_for(build: Any, words: str) -> None:
    reading = Reading()
    read_model(reading, build())
    if "other parameters" in words:  # which is only seen beside the plan
        assert reading.unknown == []
        return
    assert words in " ".join(reading.unknown)


def test_what_4_bit_weights_are_stored_in_is_read() -> None:
    quantized = config()
    quantized.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="bfloat16")
    reading = Reading()
    read_model(reading, quantized, lora())
    assert reading.fields["quantization.storage"] == "bfloat16"
    assert reading.unknown == []
    quantized.quantization_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage="int8")
    read_model(reading, quantized, lora())
    assert reading.unknown == ["`bnb_4bit_quant_storage: int8`"]
    unlike = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["lm_head", "model.layers.1.mlp"])
    quantized.quantization_config = unlike
    reading = Reading()
    read_model(reading, quantized, lora())
    assert reading.unknown == ["blocks that differ: `model.layers.1.mlp` stays in 16 bits"]


def test_an_8_bit_model_is_planned_as_it_is_traced(tmp_path: Path) -> None:
    """As transformers has loaded it and peft prepared it, which switches on checkpoints unless it is told not to."""
    model().save_pretrained(tmp_path / "saved")
    quantization = BitsAndBytesConfig(load_in_8bit=True)
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "saved", quantization_config=quantization, dtype=torch.bfloat16
    )
    prepared = prepare_model_for_kbit_training(loaded, use_gradient_checkpointing=False)
    given = get_peft_model(prepared, lora())

    for reentrant in (False, True):
        kwargs = {"use_reentrant": reentrant}
        options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs, "bf16": True}
        planned, traced = (
            preflight(trainer(tmp_path, given, **options), engine=engine) for engine in ("auto", "trace")
        )
        job = planned.result.job
        assert planned.reasons == () and job is not None
        assert ("qlora", "int8", True, reentrant) == (
            job.method,
            job.quantization.type,
            job.quantization.kbit_preparation,
            job.use_reentrant,
        )
        assert planned.result.peak.allocated_bytes == pytest.approx(
            traced.result.peak.allocated_bytes, rel=0.002
        )
    given.base_model.model.gradient_checkpointing_disable()
    assert preflight(trainer(tmp_path, given)).reasons == ()
    given.base_model.model.gradient_checkpointing_enable({"use_reentrant": True})
    reasons = preflight(trainer(tmp_path, given)).reasons
    assert reasons == ("a model that is set to checkpoint its blocks, as peft's preparation does it",)


def test_8_bits_without_a_threshold_are_not_planned() -> None:
    """Then no outliers are looked for, which takes memory too."""
    quantized = config()
    quantized.quantization_config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    reading = Reading()
    read_model(reading, quantized, lora())
    assert reading.unknown == ["`llm_int8_threshold: 0.0`"]


def test_a_model_that_is_not_what_its_config_says_is_traced(tmp_path: Path) -> None:
    given = model()
    up = given.model.layers[0].mlp.up_proj
    given.model.layers[0].mlp.up_proj = nn.Linear(up.in_features, up.out_features, bias=True)
    plan = preflight(trainer(tmp_path, given))
    assert plan.result.engine["name"] == "trace"
    assert plan.reasons == ("a model that has other parameters than its config and adapters say",)
    frozen = model()
    frozen.model.embed_tokens.requires_grad_(False)
    reading = Reading()
    read_model(reading, frozen)
    assert reading.unknown == ["a frozen `model.embed_tokens.weight`"]


def test_what_arguments_alone_cannot_say_is_refused(tmp_path: Path) -> None:
    with pytest.raises(JobError, match="how long sequences are"):
        preflight(arguments(tmp_path), config())
    with pytest.raises(TraceError, match="`neftune_noise_alpha`"):
        preflight(arguments(tmp_path, neftune_noise_alpha=5.0), config(), max_seq_len=8)
    with pytest.raises(JobError, match="`engine`"):
        preflight(arguments(tmp_path), config(), max_seq_len=8, engine="magic")
    with pytest.raises(JobError, match="a job has no words for: `neftune_noise_alpha`"):
        preflight(trainer(tmp_path, neftune_noise_alpha=5.0), engine="shape")
    for nothing in (None, "meta-llama/Llama-3.2-1B", object()):
        with pytest.raises(JobError, match="`model` has to be a transformers model or its config, not"):
            preflight(arguments(tmp_path), nothing, max_seq_len=8)
    with pytest.raises(JobError, match="an object of Linear, which is neither a Trainer nor"):
        preflight(torch.nn.Linear(2, 2), config(), max_seq_len=8)


def test_several_processes_are_planned_as_ddp_and_not_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, smoothed = arguments(tmp_path), arguments(tmp_path, label_smoothing_factor=0.1)
    monkeypatch.setattr(type(plain), "world_size", 2)
    plan = preflight(plain, config(dtype="float32"), max_seq_len=LENGTH, gpu="24GB")
    assert plan.result.job is not None and plan.result.job.parallel.dp_replicate == 2
    with pytest.raises(TraceError, match="`label_smoothing_factor`; and runs of several processes"):
        preflight(smoothed, config(dtype="float32"), max_seq_len=LENGTH)


def test_a_trainer_that_makes_its_own_batches_is_not_traced(tmp_path: Path) -> None:
    class Generating(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            raise AssertionError("not to be run")

    with pytest.raises(TraceError, match="`Generating` makes its batches while it trains"):
        preflight(trainer(tmp_path, kind=Generating))


def test_an_architecture_without_a_program_is_traced(tmp_path: Path) -> None:
    from transformers import OPTConfig

    small = OPTConfig(
        vocab_size=100, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, dtype="float32",
        word_embed_proj_dim=32, architectures=["OPTForCausalLM"],
    )  # fmt: skip
    with pytest.raises(UnknownModel):
        preflight(arguments(tmp_path), small, max_seq_len=16, engine="shape")
    plan = preflight(arguments(tmp_path), small, max_seq_len=16)
    assert plan.result.engine["name"] == "trace" and "no program" in plan.reasons[0]


def test_the_longest_rows_make_the_batch(tmp_path: Path) -> None:
    run = trainer(tmp_path, data=rows([5, 9, 64, 8, 64, 64]))
    batch = largest_batch(run)
    assert batch.shape == (2, 64) and batch.is_padded  # beside a shorter one
    assert not largest_batch(trainer(tmp_path, data=rows([7, 7, 7]))).is_padded
    assert largest_batch(run, max_seq_len=9).shape == (2, 9)
    assert str(batch) == "micro batches of 2 x 64 tokens"
    nameless = trainer(tmp_path, data=[[1, 2, 3]] * 4)
    nameless.data_collator = lambda batch: torch.tensor(batch)
    with pytest.raises(DataError, match="makes a Tensor"):
        largest_batch(nameless)
    nameless.data_collator = lambda batch: {"labels": torch.tensor(batch)}
    assert largest_batch(nameless).notes == (
        "rows have no `input_ids`: the first ones are taken for the longest",
    )


@pytest.mark.parametrize(
    "names", [("prompt_ids", "chosen_ids", "rejected_ids"), ("prompt_input_ids", "chosen_input_ids", "other")]
)
def test_the_longest_pair_of_answers_makes_the_batch(names: tuple[str, ...], tmp_path: Path) -> None:
    """As in TRL's DPOTrainer, whose collator makes two sequences of a row."""
    lengths = [(3, 4, 5), (3, 20, 2), (9, 9, 1), (2, 3, 16)]
    data = [{name: [1] * length for name, length in zip(names, row)} for row in lengths]

    def both(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        longest = max(len(row[names[0]]) + len(row[names[1]]) for row in batch)
        ids = torch.zeros(2 * len(batch), longest, dtype=torch.int64)
        return {"input_ids": ids, "completion_mask": ids.clone()}

    run = trainer(tmp_path, data=data, remove_unused_columns=False)
    run.data_collator = both
    batch = largest_batch(run)
    assert batch.shape == (4, 23) and batch.notes == ()
    longer = largest_batch(run, max_seq_len=50)
    assert longer.shape == (4, 50) and longer.tensors.keys() == {"input_ids", "completion_mask"}
    assert bool(longer.tensors["completion_mask"].all()) and not longer.is_padded


def test_of_large_data_some_rows_are_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memplan.hf.batch.MOST_ROWS", 5)
    batch = largest_batch(trainer(tmp_path, data=rows([4, 5, 6, 7] * 4)))
    assert batch.notes == ("the longest of 5 rows out of 16 is taken for the longest",)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_is_planned_where_rows_are_padded(tmp_path: Path, attention: str) -> None:
    built = model()
    built.set_attn_implementation(attention)
    run = trainer(tmp_path, built, data=rows([256] * 3 + [9]))
    shape, trace = (preflight(run, gpu="24GB", engine=engine) for engine in ("shape", "trace"))
    assert not shape.reasons and shape.peak_bytes == trace.peak_bytes
    assert shape.result.peak.reserved_bytes == trace.result.peak.reserved_bytes
    full = preflight(trainer(tmp_path, built, data=rows([256] * 4)), gpu="24GB")
    assert (shape.peak_bytes == full.peak_bytes) == (attention == "eager")


def test_a_collator_without_a_mask_is_planned_without(tmp_path: Path) -> None:
    """What the batch holds decides, not what transformers' collators make."""
    run, bare = trainer(tmp_path), trainer(tmp_path)
    bare.data_collator = lambda rows: {
        name: tensor for name, tensor in collate(rows).items() if name != "attention_mask"
    }
    plans = [
        preflight(each, gpu="24GB", engine=engine) for each in (run, bare) for engine in ("shape", "trace")
    ]
    peaks = [plan.peak_bytes for plan in plans]
    assert peaks[0] == peaks[1] == peaks[2] + 2 * LENGTH * 8 and peaks[2] == peaks[3]


def test_a_padded_batch_on_the_cpu_is_what_is_measured(tmp_path: Path) -> None:
    """Both engines: attention's mask in the dtype of the query, at every call, is part of the peak."""
    callback = MemplanCallback(say=lambda _: None)
    run = trainer(tmp_path, data=rows([120, 256]), callbacks=[callback])
    shape, trace = (preflight(run, engine=engine).peak_bytes for engine in ("shape", "trace"))
    run.train()
    assert callback.measured is not None
    measured = callback.measured.allocated_peak_bytes
    assert [shape, trace] == pytest.approx([measured] * 2, rel=0.002)


def test_the_allocator_is_that_of_the_environment() -> None:
    def read(text: str) -> tuple[Any, list[str]]:
        reading = Reading()
        return read_environment(reading, {"PYTORCH_CUDA_ALLOC_CONF": text} if text else {}), reading.notes

    assert not read("")[0].expandable_segments
    settings, notes = read("expandable_segments:True,max_split_size_mb:128,pinned_num_register_threads:2")
    assert settings.expandable_segments and settings.max_split_size_mb == 128
    assert notes == ["the allocator's `pinned_num_register_threads:2` is left out"]
    assert "are left out" in read("max_split_size_mb:many")[1][0]
