"""Other tools' names and values on input."""

from pathlib import Path
from typing import Any

import pytest

from memplan.errors import JobError
from memplan.job.aliases import ALIASES, FIELD_WORDS, REMEDIES, Not
from memplan.job.coerce import coerce
from memplan.job.fields import job_fields, job_sections
from memplan.job.load import LoadedJob, load_job
from memplan.job.spec import Job


def load(text: str, *overrides: str) -> LoadedJob:
    Path("job.yaml").write_text(f"model: gpt2\n{text}\n", encoding="utf-8")
    return load_job("job.yaml", overrides)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("per_device_train_batch_size: 4", {"micro_batch_size": 4}),
        ("train_micro_batch_size_per_gpu: 4", {"micro_batch_size": 4}),
        ("device_batch_size: 4", {"micro_batch_size": 4}),
        ("local_batch_size: 4", {"micro_batch_size": 4}),
        ("gradient_accumulation_iters: 4", {"gradient_accumulation_steps": 4}),
        ("grad_accum: 4", {"gradient_accumulation_steps": 4}),
        ("max_length: 64", {"max_seq_len": 64}),
        ("max_seq_length: 64", {"max_seq_len": 64}),
        ("sequence_len: 64", {"max_seq_len": 64}),
        ("cutoff_len: 64", {"max_seq_len": 64}),
        ("sample_packing: true", {"packing": True}),
        ("gradient_checkpointing: true", {"activation_checkpointing": "full"}),
        ("gradient_checkpointing: false", {"activation_checkpointing": "none"}),
        ("activation_checkpointing: yes", {"activation_checkpointing": "full"}),
        (
            "gradient_checkpointing: offload",
            {"activation_checkpointing": "full", "activation_offload": True},
        ),
        ("attn_implementation: flash_attention_2", {"attention": "flash_attention_2"}),
        ("flash_attention: true", {"attention": "flash_attention_2"}),
        ("optim: adamw_torch", {"optimizer": "adamw", "optimizer_kernel": "foreach"}),
        ("optim: adamw_torch_fused", {"optimizer": "adamw", "optimizer_kernel": "fused"}),
        ("optimizer: adamw_bnb_8bit", {"optimizer": "adamw_8bit"}),
        ("optim: paged_adamw_32bit", {"optimizer": "paged_adamw"}),
        ("optim: paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"}),
        ("optim: adafactor", {"optimizer": "adafactor"}),
        ("lora_r: 8", {"lora.rank": 8}),
        ("lora: {r: 8, lora_alpha: 8}", {"lora.rank": 8, "lora.alpha": 8.0}),
        ("lora_alpha: 8\nlora_dropout: 0.1", {"lora.alpha": 8.0, "lora.dropout": 0.1}),
        ("lora_target_modules: [q_proj]", {"lora.target_modules": ("q_proj",)}),
        ("lora_target: all", {"lora.target_modules": "all-linear"}),
        ("lora_target: q_proj,v_proj", {"lora.target_modules": ("q_proj", "v_proj")}),
        ("lora_target_linear: true", {"lora.target_modules": "all-linear"}),
        ("load_in_4bit: true", {"method": "qlora"}),
        ("load_in_4bit: false", {}),
        ("load_in_8bit: true\nload_in_4bit: false", {"method": "qlora", "quantization.type": "int8"}),
        ("load_in_8bit: false\nload_in_4bit: true", {"method": "qlora"}),
        ("quantization_bit: 8", {"method": "qlora", "quantization.type": "int8"}),
        ("quantization_bit: 4", {"method": "qlora"}),
        ("adapter: qlora\nload_in_4bit: true", {"method": "qlora"}),
        ("adapter:", {"method": "full"}),
        ("finetuning_type: lora\nquantization_bit: 4", {"method": "qlora"}),
        (
            "method: qlora\nbnb_4bit_use_double_quant: false\nbnb_4bit_quant_type: fp4",
            {"method": "qlora", "quantization.double_quant": False, "quantization.type": "fp4"},
        ),
        (
            "method: qlora\nbnb_4bit_quant_storage: bfloat16",
            {"method": "qlora", "quantization.storage": "bfloat16"},
        ),
        ("torch_dtype: float16", {"dtype": "float16"}),
        ("dtype: fp16", {"dtype": "float16"}),
        ("torch_dtype: torch.float32", {"dtype": "float32"}),
        ("dtype: float32\nbf16: true\nfp16: false", {"dtype": "float32", "autocast": "bfloat16"}),
        ("dtype: float32\nfp16: true", {"dtype": "float32", "autocast": "float16"}),
        ("bf16: false\nfp16: false", {}),
        ("dtype: float32\nmixed_precision: bf16", {"dtype": "float32", "autocast": "bfloat16"}),
        ("mixed_precision: no", {}),
        ("learning_rate: 2e-4", {"train.learning_rate": 2e-4}),
        ("train: {lr: 2e-4}", {"train.learning_rate": 2e-4}),
        ("train: {max_grad_norm: 1, save_steps: 5}", {"train.max_grad_norm": 1.0, "train.save_every": 5}),
        ("max_steps: 7\nseed: 1\noutput_dir: out", {
            "train.max_steps": 7, "train.seed": 1, "train.output_dir": "out",
        }),
        ("lr_scheduler_type: cosine", {"train.schedule": "cosine"}),
        ("lr_scheduler: constant_with_warmup", {"train.schedule": "constant"}),
        ("lr_scheduler_type: cosine_with_min_lr", {"train.schedule": "cosine"}),
        ("train: {min_lr: 0.00001}", {"train.min_learning_rate": 1e-5}),
        ("warmup_ratio: 0.1", {"train.warmup_ratio": 0.1}),
        ("num_warmup_steps: 7", {"train.warmup_steps": 7}),
        (
            "eval_steps: 5\nearly_stopping_patience: 2\nvalidation_file: b.json",
            {"train.eval_every": 5, "train.early_stopping": 2, "data.eval": "b.json"},
        ),
        ("save_total_limit: 2", {"train.keep_checkpoints": 2}),
        ("report_to: tensorboard", {"train.report_to": "tensorboard"}),
        ("train_on_inputs: false", {"data.mask": "prompt"}),
        ("train_on_prompt: true", {"data.mask": "none"}),
        ("mask_history: true", {"data.mask": "history"}),
        ("completion_only_loss: true", {"data.mask": "prompt"}),
        ("assistant_only_loss: false", {"data.mask": "none"}),
        ("dataset_name: a/b\ndataset_config: c", {"data.train": "a/b", "data.subset": "c"}),
        ("dataset_config_name: c\ndataset_train_split: d", {"data.subset": "c", "data.split": "d"}),
        ("train_file: a.json\nvalidation_file: b.json", {"data.train": "a.json", "data.eval": "b.json"}),
        ("field_messages: talk\nchat_template_path: t", {"data.messages": "talk", "data.chat_template": "t"}),
        ("lr_warmup_steps: 7", {"train.warmup_steps": 7}),
        (
            "adam_beta1: 0.8\nadam_beta2: 0.95\nadam_epsilon: 1.0e-6",
            {"train.beta1": 0.8, "train.beta2": 0.95, "train.epsilon": 1e-6},
        ),
        (
            "dp_shard_size: 2\nsharding_strategy: full_shard",
            {"parallel.dp_shard": 2, "parallel.strategy": "FULL_SHARD"},
        ),
        ("parallel: {strategy: zero3, dp_shard: 2}", {"parallel.dp_shard": 2, "parallel.strategy": "ZERO_3"}),
        ("npt_layers: [2, 3]\nmethod: npt", {"method": "npt", "npt.layers": (2, 3)}),
    ],
)  # fmt: skip
def test_other_tools_names_mean_the_same(text: str, expected: dict[str, Any]):
    """An alias sets exactly the fields that it means, and no others."""
    assert Job(model="gpt2").replace(**expected) == load(text).job


@pytest.mark.parametrize("name", ["model_name_or_path", "base_model", "model_name"])
def test_the_model_has_other_names_too(name: str):
    """A file without `model` but with another tool's name for it is whole."""
    Path("job.yaml").write_text(f"{name}: gpt2\n")

    assert Job(model="gpt2") == load_job("job.yaml").job


def test_an_alias_and_its_field_may_agree():
    """Saying the same twice in two languages is fine, and counts as said in ours."""
    loaded = load("max_length: 64\nmax_seq_len: 64")

    assert loaded.job.max_seq_len == 64
    assert loaded.origins["max_seq_len"] == "user"


@pytest.mark.parametrize(
    ("text", "first", "second", "field"),
    [
        ("max_length: 64\nmax_seq_len: 32", "max_length: 64", "max_seq_len: 32", "max_seq_len"),
        ("lora: {r: 8}\nlora_r: 4", "lora.r: 8", "lora_r: 4", "lora.rank"),
        ("optim: adamw_torch\noptimizer_kernel: fused", "optim: adamw_torch", "optimizer_kernel: fused",
         "optimizer_kernel"),
        ("bf16: true\nfp16: true", "bf16: true", "fp16: true", "autocast"),
        ("autocast: null\nbf16: true", "autocast: null", "bf16: true", "autocast"),
        ("method: lora\nload_in_4bit: true", "method: lora", "load_in_4bit: true", "method"),
    ],
)  # fmt: skip
def test_an_alias_and_its_field_may_not_disagree(text: str, first: str, second: str, field: str):
    """Two names of one field with two values are an error that names both."""
    with pytest.raises(JobError) as caught:
        load(text)

    assert f"`{first}` and `{second}` disagree about `{field}`" in caught.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("method: qlora\nload_in_4bit: false", "`load_in_4bit: false` contradicts `method: qlora`"),
        (
            "load_in_8bit: true\nload_in_4bit: true",
            "`load_in_4bit: true` contradicts `quantization.type: int8`",
        ),
        ("autocast: bfloat16\nbf16: false", "`bf16: false` contradicts `autocast: bfloat16`"),
        (
            "lora_target_linear: false",
            "`lora_target_linear: false` contradicts `lora.target_modules: all-linear`",
        ),
    ],
)
def test_a_denial_may_not_contradict(text: str, message: str):
    """`load_in_4bit: false` is a statement too."""
    with pytest.raises(JobError) as caught:
        load(text)

    assert f"`job.yaml` line {len(text.splitlines()) + 1}: {message}" == caught.value.message


def test_a_denial_on_the_command_line_takes_back_what_the_file_says():
    """`--set bf16=false` turns off what the file turned on."""
    assert load("bf16: true\ndtype: float32", "bf16=false").job.autocast is None
    assert load("method: qlora", "load_in_4bit=false").job.method == "lora"


def test_an_override_in_other_words_replaces_the_field():
    """An alias on the command line is laid over the file, not compared with it."""
    assert load("max_seq_len: 64", "max_length=32").job.max_seq_len == 32
    assert load("method: lora", "load_in_4bit=true").job.method == "qlora"


@pytest.mark.parametrize("name", REMEDIES)
def test_what_only_resembles_ours_is_refused_with_the_reason(name: str):
    """Names we know and do not take get more than "unknown field"."""
    with pytest.raises(JobError, match="unknown field") as caught:
        load(f"{name}: 1")

    assert REMEDIES[name] == caught.value.hint


def test_the_tables_speak_of_fields_that_exist():
    """Every alias names a field, gives a value that the field takes, and shadows no field of ours."""
    for name, alias in ALIASES.items():
        assert name not in job_fields()
        assert name not in job_sections()
        for meaning in (alias.words or {}).values():
            for target, value in (meaning if isinstance(meaning, dict) else {alias.field: meaning}).items():
                coerce(job_fields()[target], value.value if isinstance(value, Not) else value)
    for field, words in FIELD_WORDS.items():
        for meaning in words.values():
            for target, value in (meaning if isinstance(meaning, dict) else {field: meaning}).items():
                if (field, value) != ("autocast", "float32"):
                    coerce(job_fields()[target], value)
    assert not set(REMEDIES) & (set(ALIASES) | set(job_fields()))
