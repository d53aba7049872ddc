"""Checkpoints whose weights are stored quantised: planned as they are, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from memplan.cli.planning import plan, read_job
from memplan.errors import JobError, NotTrained, RunError
from memplan.fit.changes import candidate_edits
from memplan.job.load import load_job
from memplan.model.config import architecture_from_config
from memplan.model.stored import Stored, read_stored
from memplan.train.refusals import check_trainable

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 512, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
BITSANDBYTES = {
    "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": "bfloat16", "bnb_4bit_use_double_quant": True, "llm_int8_skip_modules": None,
}  # fmt: skip
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True, "checkpoint_format": "gptq"}


def write(folder: Path, base: dict[str, Any] = BITSANDBYTES, **keys: Any) -> Path:
    """A config.json with this `quantization_config`."""
    path = folder / "config.json"
    path.write_text(json.dumps(LLAMA | {"quantization_config": base | keys}))
    return path


def test_what_bitsandbytes_stores() -> None:
    """With the defaults of transformers' BitsAndBytesConfig for what is absent, and names of the first versions."""
    of = {"quantization_config": BITSANDBYTES | {"llm_int8_skip_modules": ["lm_head", "q_proj"]}}
    skip = ("lm_head", "q_proj")
    assert read_stored(of, "m") == Stored("nf4", True, compute_dtype="bfloat16", skip=skip)
    bare = {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_storage": "torch.bfloat16"}}
    assert read_stored(bare, "m") == Stored("fp4", storage="bfloat16", compute_dtype="float32")
    in_bytes = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}
    assert read_stored(in_bytes, "m") == Stored("int8")
    assert read_stored({}, "m") is None and read_stored({"quantization_config": None}, "m") is None


@pytest.mark.parametrize(
    ("given", "says", "hint"),
    [
        ({"quant_method": "awq", "bits": 4}, r"\(awq\)", "made from"),
        ({"quant_method": "mxfp4"}, r"\(mxfp4\)", r"Mxfp4Config\(dequantize=True\)"),
        ({"quant_method": "fp8"}, r"\(fp8\)", r"FineGrainedFP8Config\(dequantize=True\)"),
        ({"quant_method": "compressed-tensors"}, "compressed-tensors", "CompressedTensorsConfig"),
        (
            {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0},
            "llm_int8_threshold: 0.0",
            "made from",
        ),
        (GPTQ | {"bits": 8}, "bits: 8", "made from"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format", "made from"),
        (GPTQ | {"dynamic": {"-:.*down.*": {}}}, "dynamic", "made from"),
        (GPTQ | {"group_size": 0}, "group_size: 0", "made from"),
        ({"bits": 4}, "method not stated", "made from"),
        (BITSANDBYTES | {"bnb_4bit_quant_type": 4}, "bnb_4bit_quant_type: 4", "made from"),
        (BITSANDBYTES | {"llm_int8_skip_modules": "lm_head"}, "no list of names", "made from"),
        (
            BITSANDBYTES | {"llm_int8_skip_modules": ["model.layers.1.mlp"]},
            "single blocks",
            "MemplanCallback",
        ),
        ("gptq", "method not stated", "made from"),
    ],
    ids=str,
)
def test_what_is_not_planned(given: Any, says: str, hint: str) -> None:
    """Never as plain numbers: exit code 3, by the name of the method, with what can be done."""
    with pytest.raises(NotTrained, match=says) as refusal:
        architecture_from_config(LLAMA | {"quantization_config": given}, name="m", source="test")
    assert 3 == refusal.value.exit_code
    assert refusal.value.hint
    with pytest.raises(NotTrained, match=hint):
        raise NotTrained(refusal.value.hint)


@pytest.mark.parametrize("engine", ["shape", "trace"])
def test_a_checkpoint_of_gptq(tmp_path: Path, engine: str) -> None:
    """What the job leaves open is as transformers' Trainer trains it, in float16."""
    if engine == "trace":
        pytest.importorskip("peft")
    loaded = read_job(None, [f"model={write(tmp_path, GPTQ)}", "max_seq_len=32", "lora.rank=4"], {})
    job = loaded.job
    assert (job.method, job.loop, job.dtype) == ("qlora", "hf_trainer", "float16")
    assert (job.quantization.type, job.quantization.group_size) == ("gptq", 64)
    result = plan(loaded, engine).result
    in_blocks = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
    packed = in_blocks // 2 * (1 + 1 / 64)  # a zero of 4 bits for 64 weights
    (held,) = (line.bytes for line in result.phases[0].budget if line.category == "weights")
    others = 2 * 2 * 512 * 64 + 5 * 2 * 64  # embeddings and head, norms
    assert held == pytest.approx(packed + others, rel=0.2)  # small tensors take whole blocks

    whole = read_job(None, [f"model={write(tmp_path, GPTQ, group_size=-1)}"], {}).job
    assert whole.quantization.group_size is None
    asked = read_job(None, [f"model={tmp_path}", "loop=script", "dtype=bfloat16"], {})
    assert asked.job.loop == "script"
    with pytest.raises(JobError, match="GPTQ's scales are float16") as refusal:
        plan(asked, engine)
    assert "dtype: float16" in (refusal.value.hint or "")


@pytest.mark.parametrize("engine", ["shape", "trace"])
def test_lora_over_a_4bit_checkpoint_is_qlora(tmp_path: Path, engine: str) -> None:
    """The note says so; the weights take what QLoRA's take, and no weight is there in 16 bits while it is loaded."""
    if engine == "trace":
        pytest.importorskip("bitsandbytes")
    loaded = read_job(None, [f"model={write(tmp_path)}", "max_seq_len=32", "lora.rank=4"], {})
    assert "`method: qlora`, as the weights of" in loaded.notes[0]
    stored = plan(loaded, engine).result

    (plain := tmp_path / "plain.json").write_text(json.dumps(LLAMA))
    asked = [f"model={plain}", "max_seq_len=32", "lora.rank=4", "method=qlora"]
    packed = plan(read_job(None, asked, {}), engine).result

    (load, *_, last), (of_packed, *_, last_of_packed) = stored.phases, packed.phases
    assert "load" == load.phase == of_packed.phase
    assert "workspace" not in {line.category for line in load.budget}
    assert load.allocated_peak_bytes < of_packed.allocated_peak_bytes
    of_map = last_of_packed.allocated_peak_bytes - last.allocated_peak_bytes
    assert 0 < of_map <= 2048  # bitsandbytes' own, which packing makes


def test_storage_follows_the_checkpoint(tmp_path: Path) -> None:
    """transformers loads what is there and warns of what was asked for otherwise; the note names what changed."""
    path = write(tmp_path, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=False)
    loaded = read_job(None, [f"model={path}", "method=qlora", "quantization.type=nf4"], {})
    assert ("fp4", False) == (loaded.job.quantization.type, loaded.job.quantization.double_quant)
    assert "`quantization.type: fp4`, `quantization.double_quant: false`" in loaded.notes[0]


@pytest.mark.parametrize(
    ("overrides", "sentence", "hint"),
    [
        (["method=full"], "`method: full`", "--set method=qlora"),
        (["method=npt", "npt.quantized_base=true"], "`method: npt`", "--set method=qlora"),
        (["dtype=float16"], "dequantised to bfloat16", "--set dtype=bfloat16"),
        (["parallel.strategy=FULL_SHARD", "parallel.dp_shard=2"], "packed itself", "--set loop=hf_trainer"),
    ],
    ids=str,
)
@pytest.mark.parametrize("engine", ["shape", "trace"])
def test_jobs_that_say_otherwise(
    tmp_path: Path, overrides: list[str], sentence: str, hint: str, engine: str
) -> None:
    """By either engine, with what agrees."""
    if engine == "trace":
        pytest.importorskip("peft")
    loaded = read_job(None, [f"model={write(tmp_path)}", "max_seq_len=32", *overrides], {})
    with pytest.raises(JobError, match=sentence) as refusal:
        plan(loaded, engine)
    assert hint in (refusal.value.hint or "")


def test_fit_leaves_the_storage_alone(tmp_path: Path) -> None:
    """No edit of it is offered, which would be planned as another checkpoint."""
    path = write(tmp_path, bnb_4bit_use_double_quant=False)
    job = read_job(None, [f"model={path}", "max_seq_len=256"], {}).job
    config = json.loads(path.read_text())
    architecture = architecture_from_config(config, name="m", source="test")
    changed = {
        name
        for dimension in candidate_edits(job, architecture)
        for option in dimension.options
        for name in option.set
    }
    assert "max_seq_len" in changed
    assert not {name for name in changed if name.startswith(("quantization.", "method", "dtype"))}


def test_the_trainer_refuses_it(tmp_path: Path) -> None:
    """Before anything is loaded, and by name."""
    loaded = load_job(None, [f"model={write(tmp_path)}", "method=qlora", "data.train=memplan-docs"])
    with pytest.raises(RunError, match="stored quantised"):
        check_trainable(loaded)
