"""Trained copies of embeddings and head beside adapters, `lora.modules_to_save`: planned, trained, saved, continued."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from safetensors.torch import load_file  # noqa: E402
from tiny_runs import LLAMA, losses, prepared, stops_in, tiny_job  # noqa: E402

from memplan.errors import RunError  # noqa: E402
from memplan.train.build import build_model  # noqa: E402
from memplan.train.group import Group, join  # noqa: E402
from memplan.train.parallel import build_parallel  # noqa: E402
from memplan.train.record import Record  # noqa: E402
from memplan.train.refusals import refuse_untrainable  # noqa: E402
from memplan.train.worker import run_job  # noqa: E402

pytestmark = pytest.mark.torch

IDS = torch.tensor([[1, 2, 3, 4]])
TIED = LLAMA | {"tie_word_embeddings": True, "num_hidden_layers": 2}
BOTH = ("embed_tokens", "lm_head")
CPU = torch.device("cpu")
WEIGHTS = "adapter_model.safetensors"


def _peak(run: Path, phase: str | None) -> tuple[int, int]:
    """Planned and measured, of a phase or of all."""
    record = Record.read(run)
    assert record is not None
    planned, measured = (record.fields[which]["phases"] for which in ("plan", "measured"))
    return tuple(
        max(line["allocated_peak_bytes"] for line in lines if phase in (None, line["phase"]))
        for lines in (planned, measured)
    )


@pytest.mark.parametrize(
    ("method", "config", "saved", "changes"),
    [
        ("lora", TIED, BOTH, {"loss": "full"}),
        ("qlora", LLAMA | {"num_hidden_layers": 2}, BOTH, {"lora__dropout": 0.1}),
    ],
    ids=["tied", "qlora"],
)
def test_a_run_with_trained_copies(
    tmp_path: Path, method: str, config: dict[str, Any], saved: tuple[str, ...], changes: dict[str, Any]
) -> None:
    """
    Evaluated and sampled from; interrupted and resumed it is the uninterrupted run, bit for bit, within its plan; peft
    loads what it leaves, and what that says is what the trained model says.
    """
    job = tiny_job(
        tmp_path, method, config=config, lora__modules_to_save=saved, train__max_grad_norm=0.5, train__save_every=2,
        train__sample_prompts=1, train__sample_tokens=2, data__eval=str(tmp_path / "train.jsonl"), **changes,
    )  # fmt: skip
    whole = prepared(job)
    assert run_job(whole) == 0
    resumed = prepared(job.replace(**{"train.output_dir": str(tmp_path / "resumed")}))
    assert run_job(resumed, hook=stops_in("backward", 4)) == 70
    assert run_job(resumed, resume=True) == 0

    assert losses(resumed) == losses(whole)
    assert losses(whole)[4] < losses(whole)[1]
    left, right = (load_file(run / "final" / WEIGHTS) for run in (whole, resumed))
    assert all(torch.equal(left[name], right[name]) for name in left)
    for run, phase in ((whole, None), (resumed, "load")):
        planned, measured = _peak(run, phase)
        assert measured == pytest.approx(planned, rel=0.02)

    written = json.loads((whole / "final" / "adapter_config.json").read_text())
    assert written["modules_to_save"] == list(saved)
    plain = job.replace(**{"method": "full"})
    base = build_model(plain, config, CPU, weights_path=None).model
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    loaded = peft.PeftModel.from_pretrained(base, whole / "final").eval()
    loaded.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    assert left.keys() == load_file(tmp_path / "again" / WEIGHTS).keys()
    copies = {name.removeprefix("base_model.model."): left[name] for name in left if ".lora_" not in name}
    assert {name.split(".")[-2] for name in copies} == set(saved)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in copies.items())
    if method == "lora":
        trained = build_model(job, config, CPU, weights_path=None)
        trained.load_weights(whole / "final")
        with torch.no_grad():
            torch.testing.assert_close(
                loaded(input_ids=IDS).logits, trained.model.eval()(input_ids=IDS).logits
            )


def test_adapters_of_another_job_are_no_weights_of_this_one(tmp_path: Path) -> None:
    """An adapter without copies does not go into a model with them."""
    job = tiny_job(tmp_path, config=TIED)
    build_model(job, TIED, CPU, weights_path=None).save_weights(tmp_path / "plain")
    built = build_model(job.replace(**{"lora.modules_to_save": BOTH}), TIED, CPU, weights_path=None)

    with pytest.raises(RunError, match="embed_tokens"):
        built.load_weights(tmp_path / "plain")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": "float16"}, "cannot be float16"),
        ({"dtype": "bfloat16", "lora.modules_to_save_dtype": "float32"}, "hidden states in bfloat16"),
        (
            {
                "method": "qlora",
                "quantization.kbit_preparation": True,
                "lora.modules_to_save_dtype": "bfloat16",
            },
            "hidden states in float32",
        ),
    ],
)
def test_dtypes_that_do_not_go_together_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    """What torch would refuse in the middle of the first step; with autocast, which casts, they run."""
    job = tiny_job(tmp_path, lora__modules_to_save=BOTH).replace(**changes)

    with pytest.raises(RunError, match=words) as caught:
        refuse_untrainable(job)
    assert "modules_to_save_dtype" in (caught.value.hint or "")
    refuse_untrainable(job.replace(method="full", dtype="float32"))
    refuse_untrainable(job.replace(**{"lora.modules_to_save_dtype": "float32", "autocast": "float16"}))


def test_copies_and_an_adapter_on_the_head_are_sharded_in_one_dtype(tmp_path: Path) -> None:
    """FSDP reduces what trains outside the blocks together."""
    job = tiny_job(tmp_path, config=LLAMA | {"num_hidden_layers": 1}, dtype="bfloat16").replace(
        **{
            "offload.params": True,
            "lora.target_modules": ("q_proj", "lm_head"),
            "lora.modules_to_save": ("embed_tokens",),
            "loss": "full",
        }
    )
    config = LLAMA | {"num_hidden_layers": 1}
    group: Group = join(needs_group=True)
    try:
        with pytest.raises(RunError, match="cannot be sharded together") as caught:
            build_parallel(job, config, group, weights_path=None)
        assert "lora.modules_to_save_dtype=float32" in (caught.value.hint or "")
        same = job.replace(**{"lora.modules_to_save_dtype": "float32"})
        assert build_parallel(same, config, group, weights_path=None).trainable
    finally:
        group.leave()
