"""The jobs that come with memplan load without a word and say what they are for."""

import subprocess
import sys

import pytest

from memplan.job.fields import field_value
from memplan.job.load import load_job
from memplan.job.ready import find_ready_job, list_jobs

NAMES = [name for name, _ in list_jobs()]

INTENT = {
    "npt-gpt2": {
        "model": "gpt2", "weights": "random", "method": "npt", "dtype": "float32", "npt.layers": "upper_half",
        "npt.rank": 8, "micro_batch_size": 1, "max_seq_len": 256, "data.train": "memplan-docs",
    },
    "lora-gpt2": {
        "model": "gpt2", "weights": "random", "method": "lora", "dtype": "float32",
        "data.train": "memplan-docs",
    },
    "npt-llama-8b-naive": {
        "model": "meta-llama/Llama-3.1-8B", "method": "npt", "npt.form": "materialised", "dtype": "float32",
        "npt.layers": "upper_half", "npt.rank": 16, "micro_batch_size": 4, "max_seq_len": 512,
    },
    "npt-llama-8b": {
        "model": "meta-llama/Llama-3.1-8B", "method": "npt", "npt.form": "factored", "dtype": "float16",
        "npt.layers": (16, 17, 18, 19), "npt.rank": 8, "micro_batch_size": 1, "max_seq_len": 256,
    },
    **{
        f"lora-fsdp-{thousands}k": {
            "model": "meta-llama/Llama-3.1-8B", "method": "lora", "dtype": "bfloat16", "lora.rank": 16,
            "lora.target_modules": "all-linear", "parallel.strategy": "FULL_SHARD", "parallel.dp_shard": 2,
            "activation_checkpointing": "full", "load.ram_efficient": True, "micro_batch_size": 1,
            "max_seq_len": 1024 * thousands,
        }
        for thousands in (2, 4, 6, 8)
    },
    "qlora-ddp-8k": {
        "method": "qlora", "parallel.strategy": "NO_SHARD", "parallel.dp_replicate": 2,
        "activation_checkpointing": "full", "max_seq_len": 8192, "quantization.type": "nf4",
    },
    "qlora-fsdp-8k": {
        "method": "qlora", "parallel.strategy": "FULL_SHARD", "parallel.dp_shard": 2,
        "activation_checkpointing": "full", "max_seq_len": 8192, "quantization.type": "nf4",
    },
    "qwen2.5-7b-lora-24gb-before": {
        "model": "Qwen/Qwen2.5-7B-Instruct", "micro_batch_size": 2, "max_seq_len": 2048,
        "gradient_accumulation_steps": 8, "activation_checkpointing": "full", "lora.rank": 128,
        "lora.alpha": 256.0, "lora.dtype": "float16", "dtype": "float16", "loop": "hf_trainer",
        "lora.target_modules": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj"),
        "optimizer": "adamw", "allocator.expandable_segments": False, "gpu": "RTX 4090",
    },
    "qwen2.5-7b-lora-24gb-after": {
        "micro_batch_size": 1, "max_seq_len": 1536, "gradient_accumulation_steps": 16,
        "allocator.expandable_segments": True,
    },
}  # fmt: skip


def test_the_names_are_a_promise():
    """Scripts call these jobs by name."""
    assert sorted(INTENT) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_ready_job_is_what_its_name_says(name: str):
    """The settings that make the job what it is."""
    loaded = load_job(name)

    assert INTENT[name] == {field: field_value(loaded.job, field) for field in INTENT[name]}
    assert loaded.notes == ()
    assert f"runs/{name}" == loaded.job.train.output_dir
    assert find_ready_job(name) == loaded.path


@pytest.mark.parametrize(("name", "description"), list_jobs())
def test_a_ready_job_says_what_it_is(name: str, description: str):
    """The first line of each file is a comment of one readable line."""
    assert 20 < len(description) <= 110
    assert description[0].isupper()


def test_before_and_after_differ_in_what_the_guide_changes():
    """The pair keeps its global batch and its adapters."""
    before, after = (load_job(f"qwen2.5-7b-lora-24gb-{moment}").job for moment in ("before", "after"))

    assert before.global_batch_size == after.global_batch_size == 16
    assert before == after.replace(
        micro_batch_size=2,
        max_seq_len=2048,
        gradient_accumulation_steps=8,
        **{"allocator.expandable_segments": False, "train.output_dir": before.train.output_dir},
    )


def modules_loaded_by(code: str) -> set[str]:
    """Names of all modules that a fresh interpreter has loaded after running the code."""
    probe = f"import sys\nsys.path[:0] = {sys.path!r}\n{code}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-I", "-c", probe], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_loading_a_job_loads_only_what_it_needs():
    """Nothing heavy, nothing that only errors, JSON or TOML need."""
    code = "from memplan.job.load import load_job; load_job('npt-gpt2', ['lora.rank=8'])"
    unwanted = {
        "torch",
        "numpy",
        "pydantic",
        "transformers",
        "difflib",
        "json",
        "tomllib",
        "asyncio",
        "typer",
    }

    assert set() == unwanted & modules_loaded_by(code)


def test_the_probe_can_see_an_import():
    """Meta-test: a broken probe would make the test above pass for ever."""
    assert "difflib" in modules_loaded_by("import difflib")
