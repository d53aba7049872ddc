"""Files of other trainers are read as the job that those trainers run, or refused with what a job cannot say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from foreign_files import AXOLOTL, AXOLOTL_LORA, FACTORY, TRL, read, refusal, values

from memplan.cli.main import main


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


def test_axolotls_defaults_are_its_own():
    """What the file leaves out is axolotl's default, said in the origins and in a note."""
    loaded = read(AXOLOTL)
    job = loaded.job

    assert ("full", 512, 1, 1) == (
        job.method,
        job.max_seq_len,
        job.micro_batch_size,
        job.gradient_accumulation_steps,
    )
    assert ("bfloat16", "bfloat16", "none") == (job.dtype, job.autocast, job.activation_checkpointing)
    assert ("adamw", "fused", "hf_trainer", "full") == (
        job.optimizer,
        job.optimizer_kernel,
        job.loop,
        job.loss,
    )
    assert 1.0 == job.train.max_grad_norm
    assert "tool default" == loaded.origins["max_seq_len"]
    assert "read as axolotl 0.18 reads it" in loaded.notes[0]
    assert "`max_seq_len: 512`" in loaded.notes[0]


def test_an_axolotl_qlora_file():
    """The usual file: 4 bits with double quantisation, packing, flash attention, checkpointing, 8-bit AdamW."""
    content = AXOLOTL | {
        "adapter": "qlora", "load_in_4bit": True, "lora_r": 32, "lora_alpha": 16, "lora_dropout": 0.05,
        "lora_target_modules": ["c_attn", "c_fc"], "sequence_len": 4096, "sample_packing": True,
        "micro_batch_size": 2, "gradient_accumulation_steps": 4, "optimizer": "adamw_bnb_8bit", "bf16": "auto",
        "attn_implementation": "flash_attention_2", "gradient_checkpointing": True, "num_epochs": 2,
        "learning_rate": 2e-5, "lr_scheduler": "cosine", "warmup_ratio": 0.1, "wandb_project": "x",
        "dataset_prepared_path": "last", "val_set_size": 0.05, "lora_model_dir": None,
    }  # fmt: skip
    fields = (
        "method", "quantization.double_quant", "quantization.storage", "quantization.kbit_preparation", "lora.rank",
        "lora.dtype", "lora.target_modules", "max_seq_len", "packing", "micro_batch_size",
        "gradient_accumulation_steps", "optimizer", "attention", "activation_checkpointing", "train.epochs",
        "train.learning_rate", "train.schedule", "train.warmup_ratio",
    )  # fmt: skip
    expected = [
        "qlora", True, "bfloat16", False, 32, "float32", ("c_attn", "c_fc"), 4096, True, 2, 4, "adamw_8bit",
        "flash_attention_2", "full", 2, 2e-5, "cosine", 0.1,
    ]  # fmt: skip

    assert expected == values(content, *fields)
    assert any("evaluation" in note for note in read(content).notes)
    assert not any("not understood" in note for note in read(content).notes)


def test_llama_factorys_defaults_are_its_own():
    """LoRA of rank 8 with float32 adapters, batches of 8, checkpointing: without a word in the file."""
    fields = (
        "method", "lora.rank", "lora.alpha", "lora.target_modules", "lora.dtype", "micro_batch_size", "max_seq_len",
        "activation_checkpointing", "attention", "dtype", "autocast", "packing",
    )  # fmt: skip
    expected = ["lora", 8, 16, "all-linear", "float32", 8, 2048, "full", "sdpa", "bfloat16", None, False]

    assert expected == values(FACTORY, *fields)


@pytest.mark.parametrize(
    ("more", "field", "value"),
    [
        ({"finetuning_type": "full", "bf16": True}, "dtype", "float32"),
        ({"finetuning_type": "full", "bf16": True}, "autocast", "bfloat16"),
        ({"finetuning_type": "full", "pure_bf16": True}, "dtype", "bfloat16"),
        ({"quantization_bit": 4}, "method", "qlora"),
        ({"quantization_bit": 4, "fp16": True}, "quantization.storage", "float16"),
        ({"quantization_bit": 4, "double_quantization": False}, "quantization.double_quant", False),
        ({"lora_rank": 32}, "lora.alpha", 64),
        ({"lora_target": "q_proj, v_proj"}, "lora.target_modules", ("q_proj", "v_proj")),
        ({"lora_target": ".*q_proj, v_proj"}, "lora.target_modules", (".*q_proj", "v_proj")),
        ({"stage": "pt"}, "packing", True),
        ({"disable_gradient_checkpointing": True}, "activation_checkpointing", "none"),
        ({"use_unsloth_gc": True}, "activation_offload", True),
        ({"flash_attn": "fa2"}, "attention", "flash_attention_2"),
        ({"flash_attn": "disabled"}, "attention", "eager"),
        ({"enable_liger_kernel": True}, "loss", "fused"),
        ({"optim": "paged_adamw_8bit"}, "optimizer", "paged_adamw_8bit"),
        ({"cutoff_len": 4096}, "max_seq_len", 4096),
        ({"cutoff_len": 1023}, "max_seq_len", 1024),
        ({"cutoff_len": 4096, "packing": True}, "max_seq_len", 4104),
        ({"cutoff_len": 4096, "neat_packing": True}, "packing", True),
        ({"cutoff_len": 4095, "stage": "pt"}, "max_seq_len", 4095),
        ({"flash_attn": "auto"}, "attention", "sdpa"),
        ({"fsdp_config": {"version": 2}}, "parallel.strategy", "NO_SHARD"),
        ({"max_steps": 7, "num_train_epochs": 3.0}, "train.max_steps", 7),
        ({"per_device_train_batch_size": 2}, "micro_batch_size", 2),
    ],
)
def test_llama_factorys_words(more: dict[str, Any], field: str, value: Any):
    """Its keys mean what its code does with them: what trains is float32 unless `pure_bf16`."""
    assert [value] == values(FACTORY | more, field)


def test_trls_defaults_are_its_own():
    """float32 weights under bfloat16, checkpointed, batches of 8 with 1024 tokens, its own head and loss."""
    fields = (
        "method", "dtype", "autocast", "activation_checkpointing", "micro_batch_size", "max_seq_len", "loss", "loop",
    )  # fmt: skip
    expected = ["full", "float32", "bfloat16", "full", 8, 1024, "chunked", "hf_trainer"]

    assert expected == values(TRL, *fields)


@pytest.mark.parametrize(
    ("more", "field", "value"),
    [
        ({"use_peft": True, "lora_target_modules": "all-linear"}, "method", "lora"),
        ({"use_peft": True, "lora_target_modules": "all-linear"}, "lora.dtype", "float32"),
        (
            {"use_peft": True, "lora_target_modules": "all-linear", "load_in_4bit": True},
            "lora.dtype",
            "bfloat16",
        ),
        (
            {"use_peft": True, "lora_target_modules": ["c_fc", "c_attn"], "load_in_4bit": True},
            "quantization.double_quant",
            False,
        ),
        ({"dtype": "bfloat16", "bf16": False}, "autocast", None),
        ({"gradient_checkpointing": False}, "activation_checkpointing", "none"),
        ({"max_length": 4096, "packing": True}, "packing", True),
        ({"packing": True}, "padding_free", True),
        ({"packing": True, "packing_strategy": "wrapped"}, "padding_free", False),
        ({"activation_offloading": True}, "offload.activations", "streams"),
        ({"padding_free": True}, "padding_free", True),
        ({"max_length": 1000, "pad_to_multiple_of": 64}, "max_seq_len", 1024),
        ({"accelerate_config": "zero2"}, "parallel.dp_shard", 8),
        ({"accelerate_config": "zero2", "num_processes": 2}, "parallel.dp_shard", 2),
        ({"accelerate_config": "multi_gpu"}, "parallel.dp_replicate", 8),
        ({"accelerate_config": "single_gpu"}, "parallel.dp_replicate", 1),
        ({"num_processes": 4}, "parallel.dp_replicate", 4),
        ({"bf16": False, "accelerate_config": "multi_gpu"}, "autocast", "bfloat16"),
        ({"bf16": False, "accelerate_config": "multi_gpu", "mixed_precision": "no"}, "autocast", None),
        ({"use_liger_kernel": True}, "loss", "chunked"),
        ({"attn_implementation": "kernels-community/flash-attn2"}, "attention", "flash_attention_2"),
        ({"env": {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}}, "allocator.expandable_segments", True),
    ],
)
def test_trls_words(more: dict[str, Any], field: str, value: Any):
    """Adapters of a 4-bit base are bfloat16, others float32; its head and loss stay where Liger is asked for."""
    assert [value] == values(TRL | more, field)


def test_what_trl_sft_does_not_plan():
    """Layers that peft chooses, activations offloaded beside re-entrant checkpointing, a launcher of one's own."""
    more = {
        "use_peft": True,
        "activation_offloading": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "accelerate_config": "my.yaml",
    }
    message = refusal(TRL | more).message
    assert "there is no file `my.yaml`" in message

    assert "asks for 3 things" in message
    assert (
        "FULL_SHARD"
        == read(TRL | {"accelerate_config": "fsdp2"}, "parallel.dp_shard=2").job.parallel.strategy
    )


@pytest.mark.parametrize(
    ("more", "field", "value"),
    [
        ({"bf16": False, "attn_implementation": "sdpa"}, "dtype", "float32"),
        ({"bf16": False, "fp16": True}, "autocast", "float16"),
        ({"bf16": False, "bfloat16": True}, "autocast", "bfloat16"),
        ({"bf16": "full"}, "autocast", None),
        ({"bf16": "full"}, "dtype", "bfloat16"),
        ({"tokens": ["<a>", "<b>"]}, "data.special_tokens", ("<a>", "<b>")),
        ({"tokens": ["<a>"], "resize_token_embeddings_to_32x": True}, "data.vocab_multiple", 32),
        ({"max_grad_norm": 0}, "train.max_grad_norm", None),
        ({"batch_size": 8, "micro_batch_size": 2}, "gradient_accumulation_steps", 4),
        ({"attn_implementation": None, "flash_attention": True}, "attention", "flash_attention_2"),
        ({"adapter": "lora", "lora_target_linear": True, "attn_implementation": None, "eager_attention": True},
         "attention", "eager"),
        ({"plugins": ["axolotl.integrations.liger.LigerPlugin"], "liger_rope": True}, "loss", "full"),
        ({"liger_fused_linear_cross_entropy": True}, "loss", "fused"),
        ({"plugins": ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin"]}, "loss", "fused"),
        ({"gradient_checkpointing": True, "activation_offloading": "hidden_states"}, "activation_offload", True),
        ({"gradient_checkpointing": "offload", "gradient_checkpointing_kwargs": {"use_reentrant": False}},
         "offload.activations", "streams"),
        ({"gradient_checkpointing": True, "activation_offloading": "legacy", "adapter": None}, "offload.activations",
         "synchronous"),
        ({"gradient_checkpointing": True, "activation_offloading": "disk", "adapter": None}, "activation_checkpointing",
         "full"),
        ({"optimizer": "adamw_torch"}, "optimizer_kernel", "foreach"),
        ({"fsdp_version": 2, "dp_shard_size": 8, "fsdp_config": {"reshard_after_forward": True}},
         "parallel.strategy", "FULL_SHARD"),
        ({"fsdp_version": 2, "dp_shard_size": 8, "fsdp_config": {"fsdp_reshard_after_forward": False}},
         "parallel.strategy", "SHARD_GRAD_OP"),
        ({"fsdp_version": 2, "dp_shard_size": 8, "fsdp_config": {"offload_params": True}}, "offload.params", True),
        ({"fsdp": ["full_shard", "auto_wrap"], "dp_shard_size": 8}, "parallel.fsdp_version", 1),
        ({"fsdp": ["full_shard"], "dp_shard_size": 8, "adapter": "qlora", "load_in_4bit": True,
          "lora_target_linear": True},
         "quantization.storage", "bfloat16"),
        ({"fsdp_config": {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}, "dp_shard_size": 8},
         "parallel.strategy", "FULL_SHARD"),
        ({"fsdp_version": 2, "dp_shard_size": 4, "dp_replicate_size": 2, "fsdp_config": {"offload_params": False}},
         "parallel.strategy", "HYBRID_SHARD"),
        ({"fsdp_config": {"offload_params": False}, "dp_shard_size": 8}, "parallel.backward_prefetch", "NO_PREFETCH"),
        ({"fsdp_config": {"fsdp_backward_prefetch": "BACKWARD_POST"}, "dp_shard_size": 8},
         "parallel.backward_prefetch", "BACKWARD_POST"),
        ({"pretraining_dataset": [{"path": "x"}]}, "packing", True),
        ({"warmup_steps": 10}, "train.warmup_steps", 10),
        ({"warmup_steps": 0.1}, "train.warmup_ratio", 0.1),
    ],
)  # fmt: skip
def test_axolotls_words(more: dict[str, Any], field: str, value: Any):
    """Old and new spellings, with and without `fsdp_`, plugins by their class."""
    assert [value] == values(AXOLOTL | more, field)


@pytest.mark.parametrize(
    ("more", "named", "settled"),
    [
        ({"rl": "dpo"}, "`rl: dpo` is not planned", None),
        ({"optimizer": "muon"}, "`optimizer` cannot be `muon`", "optimizer=adamw"),
        ({"attn_implementation": "flex_attention"}, "attention by `flex_attention`", "attention=sdpa"),
        ({"gradient_checkpointing": "offload"}, "offload of all activations", "offload.activations=none"),
        ({"lora_target_linear": None, "lora_target_modules": "q_proj"}, "reaches peft as a pattern for whole names",
         "lora.target_modules=[q_proj]"),
        ({"lora_target_linear": None}, "`lora_target_modules` is missing", "lora.target_modules=all-linear"),
        ({"peft_layers_to_transform": [0, 1]}, "`peft_layers_to_transform` is not planned here", None),
        ({"lora_exclude_modules": ["q_proj"]}, "`lora_exclude_modules` is not planned", None),
        ({"load_in_8bit": True, "load_in_4bit": True}, "a base in 8 bits", "method=lora"),
        ({"adapter": "llama-adapter"}, "`adapter: llama-adapter`", "method=lora"),
        ({"lora_rank_pattern": {"q": 2}}, "`lora_rank_pattern` is not planned", None),
        ({"deepspeed": "no/zero3.json"}, "`no/zero3.json` are not there", "parallel.strategy=NO_SHARD"),
        ({"unfrozen_parameters": ["lm_head"]}, "`unfrozen_parameters` is not planned", None),
        ({"adapter": None, "attn_implementation": "sdpa"}, "embeddings, norms and head in float32", "attention=sdpa"),
        ({"tensor_parallel_size": 2}, "`tensor_parallel_size: 2` is not planned", None),
        ({"fsdp_version": 2, "fsdp_config": {"offload_params": False}}, "over how many GPUs it does not say",
         "parallel.dp_shard=4"),
        ({"fsdp_version": 2, "dp_shard_size": 2, "fsdp_config": {"auto_wrap_policy": "SIZE_BASED_WRAP"}},
         "`auto_wrap_policy: SIZE_BASED_WRAP`", None),
        ({"fsdp_config": {"forward_prefetch": True}, "dp_shard_size": 2}, "`forward_prefetch: true` of FSDP1",
         "parallel.fsdp_version=1"),
        ({"fsdp_config": {"offload_params": True}, "dp_shard_size": 2}, "`offload.params` is not planned",
         "parallel.fsdp_version=2"),
        ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "DeepSpeed's stage 0", "parallel.strategy=NO_SHARD"),
        ({"use_eaft": True}, "`use_eaft: true`", None),
    ],
)  # fmt: skip
def test_what_a_job_cannot_say_is_refused(more: dict[str, Any], named: str, settled: str | None):
    """One sentence with the place and a remedy; setting the field that it is about settles it."""
    error = refusal(AXOLOTL_LORA | more)

    assert named in error.message
    assert error.hint
    assert 3 == error.exit_code
    if settled is None:
        assert named in refusal(AXOLOTL_LORA | more, "optimizer=adamw").message
    else:
        assert read(AXOLOTL_LORA | more, settled).tool == "axolotl"


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"tensor_model_parallel_size": 2, "recompute_granularity": "full"}, "a run on Megatron"),
        ({"use_dft_loss": True}, "`use_dft_loss: true`"),
    ],
)
def test_what_llama_factory_runs_otherwise_is_refused(more: dict[str, Any], named: str):
    """Another trainer, and losses that hold more of the logits."""
    assert named in refusal(FACTORY | more).message


def test_no_length_is_no_default():
    """TRL cuts nothing with `max_length: null`: the longest sample has to be named."""
    assert "`max_length: null`" in refusal(TRL | {"max_length": None}).message
    assert 4096 == read(TRL | {"max_length": None}, "max_seq_len=4096").job.max_seq_len


@pytest.mark.parametrize(
    ("content", "has"),
    [
        (TRL | {"packing": True}, False),
        (FACTORY | {"neat_packing": True}, True),
        (FACTORY | {"packing": True}, False),
        (AXOLOTL_LORA | {"sample_packing": True, "attn_implementation": "sdpa"}, True),
        (AXOLOTL_LORA | {"sample_packing": True}, False),
    ],
)
def test_masks_of_packed_rows_are_named(content: dict[str, Any], has: bool):
    """Where documents of a row are kept apart, the kernel cannot, and no plan has it: TRL's are planned."""
    assert has == any("mask of tokens x tokens" in note for note in read(content).notes)


@pytest.mark.parametrize("more", [{"do_train": False}, {"dataset": None}])
def test_a_file_that_trains_nothing_is_refused(more: dict[str, Any]):
    """LLaMA-Factory's files for chat, export and prediction name a model and a template too."""
    assert "it trains nothing" in refusal(FACTORY | more).message


def test_several_refusals_are_one_list(capsys: pytest.CaptureFixture[str]):
    """All of it at once, each with its line, and exit code 3: the file is in order, and memplan cannot tell."""
    Path("config.yml").write_text(yaml.safe_dump(AXOLOTL_LORA | {"rl": "kto", "optimizer": "muon"}))

    assert 3 == main(["estimate", "config.yml"])
    message = capsys.readouterr().err
    assert "asks for 2 things that are not planned" in message
    assert "`rl: kto`" in message
    assert "`optimizer` cannot be `muon`" in message


def test_deepspeeds_file_is_read_from_beside_the_config():
    """The stage and what is offloaded, from the JSON file that the config names."""
    Path("ds").mkdir()
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}
    Path("ds/z3.json").write_text(json.dumps({"zero_optimization": zero | {"reduce_bucket_size": 5e8}}))
    loaded = read(
        FACTORY | {"finetuning_type": "full", "bf16": True, "deepspeed": "ds/z3.json"}, "parallel.dp_shard=4"
    )

    assert "ZERO_3" == loaded.job.parallel.strategy
    assert (True, False) == (loaded.job.offload.optimizer, loaded.job.offload.params)
    assert any("`reduce_bucket_size`" in note for note in loaded.notes)


def test_deepspeeds_own_defaults_are_no_news():
    """Named as they are without a word, they change nothing."""
    zero = {
        "stage": 3,
        "stage3_max_live_parameters": 1e9,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
    }
    content = FACTORY | {"bf16": True, "deepspeed": {"zero_optimization": zero}}

    assert not any("buckets" in note for note in read(content, "parallel.dp_shard=4").notes)


def test_flags_go_over_the_file():
    """As over a job file: what is typed counts."""
    assert 64 == read(AXOLOTL, "max_seq_len=64").job.max_seq_len
    assert "user" == read(AXOLOTL, "max_seq_len=64").origins["max_seq_len"]


def test_keys_that_nobody_knows_are_named():
    """Left out, and said."""
    note = "not understood of this axolotl file, and left out: `frobnicate`"

    assert note in read(AXOLOTL | {"frobnicate": 3}).notes
    assert note not in read(AXOLOTL).notes


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (
            {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP"},
            "accelerate's launch settings",
        ),
        ({"zero_optimization": {"stage": 2}}, "DeepSpeed's settings"),
        ({"peft_type": "LORA", "base_model_name_or_path": "x", "r": 8}, "the settings of peft adapters"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "a model's config"),
        ({"tokenizer": {}, "checkpointer": {}, "model": {}}, "a torchtune recipe"),
    ],
)
def test_files_that_are_no_job_are_told_apart(content: dict[str, Any], what: str):
    """A launcher's or a model's file is no list of unknown fields."""
    error = refusal(content)

    assert what in error.message
    assert error.hint


def test_a_job_of_ours_with_other_names_stays_one():
    """Aliases alone make no file of another tool."""
    loaded = read({"base_model": "gpt2", "sequence_len": 64, "micro_batch_size": 2})

    assert loaded.tool is None
    assert "memplan" == loaded.job.loop
