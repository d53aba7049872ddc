"""The search over traces of the real step: for models that the shape writer has no program for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from toy_estimator import card

from memplan.fit import maximize, search_changes
from memplan.job.load import load_job
from memplan.model.config import architecture_from_config
from memplan.tracing.evaluate import TracedEstimate, outline

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 256, "intermediate_size": 512,
    "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 32000,
    "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "hidden_act": "silu", "tie_word_embeddings": False,
}  # fmt: skip
BLOOM = {
    "architectures": ["BloomForCausalLM"], "model_type": "bloom", "hidden_size": 256, "n_layer": 5, "n_head": 8,
    "vocab_size": 32000,
}  # fmt: skip
GEMMA3 = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "vocab_size": 1000,
    },
}  # fmt: skip
JOB = load_job("gpt2", ["method=full", "micro_batch_size=4", "max_seq_len=256"]).job


def test_an_outline_is_the_architecture_in_short():
    """Where a program knows the model, both say the same."""
    architecture = architecture_from_config(LLAMA, name="tiny", source="a test")

    short = outline("tiny", LLAMA)

    assert {field: getattr(architecture, field) for field in short._fields} == short._asdict()


def test_an_outline_speaks_of_the_text_part():
    """A model with other towers has its numbers in a part of its config; what is not said is 0, or nothing."""
    assert ("gemma3", 64, 3, 32, 1024) == outline("tiny", GEMMA3)[1:6]
    assert (256, 5, 32, 0, None, None) == outline("tiny", BLOOM)[2:]


def test_traces_find_what_the_shape_writer_finds():
    """Both engines' plans are the same, and so are the smallest changes."""
    architecture = architecture_from_config(LLAMA, name="tiny", source="a test")
    estimate = TracedEstimate(LLAMA)
    limit = card(int(estimate.need_bytes(JOB) * 0.8))

    traced = search_changes(JOB, outline("tiny", LLAMA), limit, evaluate=estimate, num_results=1)
    shaped = search_changes(JOB, architecture, limit, num_results=1)

    assert shaped.changes
    assert traced.changes == shaped.changes


def test_the_longest_sequence_of_a_traced_model():
    """It fits, the next one does not; a config that names no longest sequence bounds none."""
    estimate, short = TracedEstimate(BLOOM), outline("tiny", BLOOM)
    job = JOB.replace(attention="eager", micro_batch_size=1)
    limit = card(estimate.need_bytes(job.replace(max_seq_len=320)))

    frontier = maximize(job, short, limit, "max_seq_len", evaluate=estimate)

    assert ("capacity", 320) == (frontier.limit, frontier.value)
    assert estimate.need_bytes(job.replace(max_seq_len=384)) > limit.usable_bytes


def test_fit_answers_for_a_model_without_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """From the command line: exit code 0, and a change whose estimate is the need that it names."""
    from memplan.cli.main import main

    (tmp_path / "config.json").write_text(json.dumps(BLOOM))
    job = ["--model", str(tmp_path), "--method", "full", "--micro-batch-size", "4", "--format", "json"]
    assert main(["estimate", *job]) == 0
    needed = json.loads(capsys.readouterr().out)["need_bytes"]

    assert main(["fit", *job, "--gpu", f"{needed * 9 // 10240}KiB"]) == 0
    change = json.loads(capsys.readouterr().out)["changes"][0]
    sets = [
        word for field, value in change["set"].items() for word in ("--set", f"{field}={json.dumps(value)}")
    ]

    assert main(["estimate", *job, *sets]) == 0
    assert json.loads(capsys.readouterr().out)["need_bytes"] == change["need_bytes"] < needed
