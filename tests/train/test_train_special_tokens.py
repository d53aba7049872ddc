"""Tokens that a job adds: in the tokenizer, in embeddings and head, in the plan, and in what is saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402
from tiny_runs import LLAMA, SENTENCES, losses, prepared, tiny_job, tokenizer_folder  # noqa: E402

from memplan.errors import DataError  # noqa: E402
from memplan.job.spec import Job  # noqa: E402
from memplan.train.merge import merge  # noqa: E402
from memplan.train.output_folder import different_fields  # noqa: E402
from memplan.train.record import Record  # noqa: E402
from memplan.train.skeleton import add_mean_rows  # noqa: E402
from memplan.train.tokens import load_tokenizer  # noqa: E402
from memplan.train.worker import run_job  # noqa: E402

pytestmark = pytest.mark.torch

TOKENS = ("<user>", "<bot>", "<tool>", "<end>")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
IDS = (257, 258, 259, 260)
"""The tokenizer has 257 tokens, and the model 260 embeddings."""


def _job(root: Path, method: str = "lora", *, tied: bool = False, **changes: Any) -> Job:
    """A job on weights in a folder, whose text uses the tokens it adds."""
    config = LLAMA | {"tie_word_embeddings": tied, "num_hidden_layers": 2}
    job = tiny_job(
        root, method, config=config, weights="pretrained", data__special_tokens=TOKENS, data__vocab_multiple=8
    ).replace(**{name.replace("__", "."): value for name, value in changes.items()})
    tokenizer_folder(root)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**config))
    model.save_pretrained(root / "model")
    generation = {"temperature": 0.5, "do_sample": True, "eos_token_id": [256, 260]}
    (root / "model" / "generation_config.json").write_text(json.dumps(generation))
    rows = [{"text": f"<user>{sentence}<bot>{sentence}<end>"} for sentence in SENTENCES]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return job


def _logits(model: Any) -> torch.Tensor:
    ids = torch.tensor([[5, *IDS, 7]])
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("full", {}),
        ("lora", {}),
        ("lora", {"tied": True, "loss": "chunked"}),
        ("lora", {"lora__train_tokens": False}),
    ],
    ids=["full", "untied", "tied, chunked", "frozen"],
)
def test_a_run_with_new_tokens(tmp_path: Path, method: str, changes: dict[str, Any]) -> None:
    """
    It keeps to its plan; transformers and peft load what it leaves, with one id for each new token; merged, it is the
    same model.
    """
    job = _job(tmp_path, method, **changes)
    folder = prepared(job)
    assert run_job(folder) == 0
    assert losses(folder)[4] < losses(folder)[1]
    record = Record.read(folder)
    assert record is not None
    planned = record.fields["plan"]["peak"]["allocated_bytes"]
    measured = record.fields["measured"]["peak"]["allocated_peak_bytes"]
    assert measured == pytest.approx(planned, rel=0.02)

    final = folder / "final"
    tokenizer = transformers.AutoTokenizer.from_pretrained(final)
    assert tuple(tokenizer.convert_tokens_to_ids(list(TOKENS))) == IDS
    assert tokenizer("a<bot>b")["input_ids"] == [97, 258, 98]
    if method == "full":
        # What vLLM reads; the base's own way to generate is kept, and a cache used again.
        files = {path.name for path in final.iterdir()}
        assert files >= {"config.json", "generation_config.json", "model.safetensors", *TOKENIZER}
        generation = transformers.GenerationConfig.from_pretrained(final)
        assert (generation.temperature, generation.eos_token_id) == (0.5, [256, 260])
        config = json.loads((final / "config.json").read_text())
        assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
        assert config["use_cache"]
        model = transformers.AutoModelForCausalLM.from_pretrained(final)
        assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 264
        return
    # Resizes the embeddings to the tokenizer's length, and so knows nothing of the rows that only round up.
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(final, dtype=torch.float32)
    merge(folder, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.get_input_embeddings().weight.shape[0] == merged.config.vocab_size == 264
    assert len(transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")) == 261
    rows = load_file(final / "adapter_model.safetensors")
    trained = [name for name in rows if "trainable_tokens_delta" in name]
    if not job.lora.train_tokens:
        assert not trained
        return
    assert len(trained) == (1 if changes.get("tied") else 2)
    assert all(rows[name].shape == (4, 32) for name in trained)
    torch.testing.assert_close(_logits(merged)[..., :261], _logits(adapted)[..., :261])


def test_new_tokens_in_copies_that_train(tmp_path: Path) -> None:
    """All rows train in copies of the grown, tied matrix: peft's model on a base that has grown as much, and merged."""
    saved = ("embed_tokens", "lm_head")
    job = _job(tmp_path, tied=True, lora__modules_to_save=saved, train__max_steps=2)
    folder = prepared(job)
    assert run_job(folder) == 0

    base = transformers.AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
    base.resize_token_embeddings(264)
    expected = _logits(peft.PeftModel.from_pretrained(base, folder / "final"))
    merge(folder, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 264
    assert not merged.config.tie_word_embeddings
    torch.testing.assert_close(_logits(merged), expected)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    """The trained rows and their optimizer states are in the checkpoint; another list of tokens is another job."""
    job = _job(tmp_path, train__save_every=2, train__max_steps=4)
    whole = prepared(job)
    assert run_job(whole) == 0
    parted = job.replace(**{"train.output_dir": str(tmp_path / "parted")})
    assert run_job(prepared(parted.replace(**{"train.max_steps": 2}))) == 0
    assert run_job(prepared(parted), resume=True) == 0

    assert losses(tmp_path / "parted") == losses(whole)
    left, right = (
        load_file(run / "final" / "adapter_model.safetensors") for run in (whole, tmp_path / "parted")
    )
    assert all(torch.equal(left[name], right[name]) for name in left)
    assert different_fields(job, job.replace(**{"data.special_tokens": TOKENS[:2]})) == [
        "data.special_tokens"
    ]


def test_added_rows_are_the_mean_of_the_others() -> None:
    """As transformers' `resize_token_embeddings` draws them, but for its 1e-9 of the covariance."""
    config = transformers.LlamaConfig(**LLAMA)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    weight = model.get_input_embeddings().weight.detach().clone()
    model.resize_token_embeddings(264)

    ours = add_mean_rows(weight, 264)

    torch.testing.assert_close(ours, model.get_input_embeddings().weight.detach(), atol=1e-4, rtol=0)
    assert torch.equal(ours[:260], weight)


def test_tokens_need_a_tokenizer(tmp_path: Path) -> None:
    """Bytes have no tokens to add to; tokens that are known already keep their ids."""
    with pytest.raises(DataError, match="trains on bytes"):
        load_tokenizer("m", None, weights="random", vocab_size=300, special_tokens=["<a>"])
    folder = tokenizer_folder(tmp_path)
    tokenizer = load_tokenizer(
        str(folder), folder, weights="pretrained", vocab_size=260, special_tokens=["<a>", "<eos>"]
    )
    assert (tokenizer.size, tokenizer.num_new, tokenizer.special_ids) == (257, 1, (257, 256))
