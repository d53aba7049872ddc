"""NPT runs: a 4-bit base, and what a run says about its blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

from tiny_runs import GPT2, LLAMA, losses, model_folder, prepared, tiny_job

from memplan.job.load import load_job
from memplan.job.spec import Job, Train
from memplan.train.record import Record, read_metrics_lines
from memplan.train.worker import run_job

pytestmark = pytest.mark.torch


def test_a_4bit_base_trains_as_planned(tmp_path: Path) -> None:
    """`npt.quantized_base`: the error falls; the plan is within 1 % of what was measured in its steps."""
    config = LLAMA | {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 600}
    # So short that every micro batch has a sample of full length.
    changes = {"max_seq_len": 24, "npt__quantized_base": True, "npt__modulation_scale": 1.0}
    changes |= {"npt__bias": True, "npt__target": "gate_up"}
    folder = prepared(tiny_job(tmp_path, "npt", config=config, train__max_steps=12, **changes))

    assert run_job(folder) == 0

    curve = losses(folder)
    assert sum(curve[step] for step in (11, 12)) < 0.9 * sum(curve[step] for step in (1, 2))
    record = Record.read(folder)
    assert record is not None
    measured, planned = (
        {
            phase: max(line["allocated_peak_bytes"] for line in lines if line["phase"] == phase)
            for phase in ("forward", "optimizer_step")
        }
        for lines in (record.fields["measured"]["phases"], record.fields["plan"]["phases"])
    )
    for phase, peak_bytes in measured.items():
        assert peak_bytes == pytest.approx(planned[phase], rel=0.01), phase


@pytest.mark.parametrize("objective", ["layer", "end_to_end"])
def test_a_run_tells_how_near_its_blocks_are(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], objective: str
) -> None:
    """
    Lines have error and delta norm of each block; evaluated steps too, and the perplexity with NPT blocks on and off;
    the table at the end has them all.
    """
    job = tiny_job(tmp_path, "npt", train__max_steps=2, train__save_every=1, npt__objective=objective)
    folder = prepared(job.replace(**{"data.eval": job.data.train}))

    assert run_job(folder) == 0

    first, second = read_metrics_lines(folder)
    text = capfd.readouterr().err
    table = text[text.index("NPT block") :].split("\n\n")[0].splitlines()
    if objective == "layer":
        assert {"0", "1", "2"} == first["relative_error"].keys() == first["delta_norm"].keys()
        assert 0.0 == max(first["delta_norm"].values()) < min(second["delta_norm"].values()), (
            "B starts at zero"
        )
    assert {"0", "1", "2"} == first["eval_delta_norm"].keys() <= first["eval_relative_error"].keys()
    assert ("end_to_end" in first["eval_relative_error"]) == (objective == "end_to_end")
    for layer, error in second["eval_relative_error"].items():
        assert 0.0 < error < 1.5
        (row,) = (line for line in table if line.startswith(layer.replace("_", " ") + " "))
        assert f"{error:.3g}" in row.split()
    assert f"of the base {second['eval_base_perplexity']:.4g}" in table[-1]
    assert first["eval_perplexity"] != first["eval_base_perplexity"]
    assert first["eval_base_perplexity"] == second["eval_base_perplexity"], "the base does not train"
    assert first["eval_base_perplexity"] > 1.0


def test_end_to_end_training_runs_and_resumes(tmp_path: Path) -> None:
    """The loss falls, lines tell the relative error, and a resumed run is the whole one."""
    changes = {"npt__objective": "end_to_end", "npt__modulation_scale": 1.0, "npt__bias": True}
    changes |= {"npt__logits_weight": 0.5}
    job = tiny_job(tmp_path, "npt", config=GPT2, train__max_steps=10, train__save_every=5, **changes)
    job = job.replace(**{"data.eval": job.data.train})
    whole = prepared(job)
    assert run_job(whole) == 0
    lines = read_metrics_lines(whole)
    assert lines[-1]["eval_loss"] < lines[4]["eval_loss"]
    assert 0.0 < lines[0]["relative_error"]["end_to_end"]

    halved = job.replace(**{"train.output_dir": str(tmp_path / "halved")})
    assert run_job(prepared(halved.replace(**{"train.max_steps": 5}))) == 0
    assert run_job(prepared(halved), resume=True) == 0
    assert losses(Path(halved.train.output_dir)) == losses(whole)


@pytest.mark.parametrize("method", ["npt", "lora"])
def test_samples_are_what_transformers_would_generate(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Every continuation is greedy generation's, without dropout, and in the log; NPT has two of each prompt."""
    import torch

    from memplan.npt import npt_blocks, set_mode
    from memplan.train import continuations as module

    checked = []

    def check(job: Job, parallel: Any, samples: Any, decode: Any) -> list[module.Continuation]:
        model = parallel.built.model
        for block in npt_blocks(model) if method == "npt" else ():
            torch.nn.init.normal_(block.np.B, std=0.5)
        found = continuations(job, parallel, samples, decode)
        was_training = model.training
        model.eval()
        for prompt, one in zip(module.prompts(job, samples), found, strict=True):
            for who, text in one.texts.items():
                if method == "npt":
                    set_mode(model, who)
                ids = torch.tensor([prompt])
                out = model.generate(
                    input_ids=ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, eos_token_id=None
                )
                assert decode(out[0, len(prompt) :].tolist()) == text
            checked.append(one)
        model.train(was_training)
        return found

    continuations = module.continuations
    monkeypatch.setattr(module, "continuations", check)
    changes = {"train__sample_prompts": 3, "train__sample_tokens": 6, "npt__modulation_scale": 3.0}
    job = tiny_job(tmp_path, method, train__max_steps=1, lora__dropout=0.5, **changes)

    assert run_job(prepared(job.replace(**{"data.eval": job.data.train}))) == 0

    names = ["base", "npt"] if method == "npt" else ["model"]
    assert [list(one.texts) for one in checked] == [names] * 3
    assert method != "npt" or any(one.texts["base"] != one.texts["npt"] for one in checked)
    lines = capfd.readouterr().err.splitlines()
    assert sum(line.startswith("sample ") for line in lines) == 3
    assert sum(line.split(":")[0].strip() in names for line in lines) == 3 * len(names)


def test_a_prompt_ends_where_the_loss_begins() -> None:
    """That of a row with a prompt is the prompt; of text, the first half of the first document."""
    from memplan.train.continuations import prompts
    from memplan.train.samples import MASKED, START, Samples

    rows = [
        [1 | START | MASKED, 2 | MASKED, 3, 4, 5, 6],
        [1 | START, 2, 3, 4, 5 | START, 6, 7, 8],
        [1 | START, 2, 3, 4, 5, 6, 7, 8],
        [1 | START],
    ]
    offsets = [sum(map(len, rows[:count])) for count in range(len(rows) + 1)]
    samples = Samples(
        tokens=[token for row in rows for token in row], offsets=offsets, targets=[1] * len(rows), digest=""
    )
    train = Train(sample_prompts=9, sample_tokens=5)

    assert prompts(Job(model="tiny", max_seq_len=8, train=train), samples) == [[1, 2], [1, 2], [1, 2, 3], [1]]


@pytest.mark.parametrize(("name", "config"), [("npt-gpt2", GPT2), ("npt-llama-8b", LLAMA)])
def test_ready_jobs_run_on_tiny_models(tmp_path: Path, name: str, config: dict[str, Any]) -> None:
    """What ships as GPT-2 in float32 and as Llama-3.1-8B in float16 trains two steps of its own settings."""
    job = load_job(name).job
    tiny = {
        "model": str(model_folder(tmp_path, config)),
        "weights": "random",
        "max_seq_len": 32,
        "npt.layers": (1, 2),
        "train.max_steps": 2,
        "train.output_dir": str(tmp_path / "run"),
    }
    folder = prepared(job.replace(**tiny))

    assert run_job(folder) == 0

    lines = read_metrics_lines(folder)
    assert [{"1", "2"}] * 2 == [line["relative_error"].keys() for line in lines]
    assert (folder / "final" / "npt.safetensors").exists()
