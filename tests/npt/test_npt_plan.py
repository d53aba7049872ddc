"""What the planner says of NPT jobs, without torch."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.budget.count import count_parameters
from memplan.budget.estimate import estimate
from memplan.budget.result import Result
from memplan.errors import JobError
from memplan.job.check import check_job, notes_on
from memplan.job.spec import Job, Npt, Quantization, Train
from memplan.model.config import architecture_from_config

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1000, "hidden_size": 64,
    "intermediate_size": 176, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 1000, "n_embd": 64, "n_head": 4,
    "n_layer": 6, "n_positions": 512,
}  # fmt: skip
QUANTIZATION = Quantization()


def plan(config: dict[str, Any] = LLAMA, *, quantization: Quantization = QUANTIZATION, **npt: Any) -> Result:
    """The estimate of 16 x 32 tokens on a tiny model in float32."""
    job = Job(
        model="tiny",
        method="npt",
        dtype="float32",
        micro_batch_size=16,
        max_seq_len=32,
        npt=Npt(**npt),
        quantization=quantization,
    )
    return estimate(job, architecture_from_config(config, name="tiny", source="test"))


@pytest.mark.parametrize(
    ("npt", "per_block"),
    [
        ({"rank": 8}, 8 * (64 + 176)),
        ({"rank": 8, "variant": "outer", "components": 3}, 3 * 8 * (2 * 64 + 176)),
        ({"rank": 8, "target": "gate_up", "bias": True}, 2 * (8 * (64 + 176) + 8)),
        ({"rank": 8, "variant": "linear", "target": "all", "bias": True}, 3 * (8 * (2 * 64 + 176) + 8)),
    ],
)
def test_trained_parameters_by_hand(npt, per_block):
    """r (d + f) per block, k r (2 d + f) with a C; two or three times that for as many matrices; r for a bias."""
    job = Job(model="tiny", method="npt", npt=Npt(**npt))
    counted = count_parameters(job, architecture_from_config(LLAMA, name="tiny", source="test"))
    assert 3 * per_block == counted.trainable
    held = next(line.bytes for line in plan(**npt).budget if line.category == "adapters")
    assert 3 * per_block * 4 <= held < 3 * (per_block * 4 + 4 * 512), "each tensor rounded up to 512 bytes"


@pytest.mark.parametrize("variant", ["diag", "outer"])
def test_the_factored_form_never_holds_a_delta(variant):
    """The largest activation of the materialised form is N d f numbers, that of the factored one N f."""
    largest = {}
    for form in ("factored", "materialised"):
        result = plan(variant=variant, components=2, form=form)
        largest[form] = max(tensor.bytes for tensor in result.top if tensor.category == "activations")
    assert 512 * 176 * 4 == largest["factored"]
    assert 512 * 64 * 176 * 4 == largest["materialised"]


def test_memory_of_activations_does_not_grow_with_the_number_of_converted_blocks():
    """One block's graph at a time: what grows is what trains, four float32 numbers per parameter."""
    activations = {
        layers: next(line.bytes for line in plan(layers=layers).budget if line.category == "activations")
        for layers in ((5,), "all")
    }
    assert activations[(5,)] == activations["all"]


def test_a_second_matrix_needs_a_gated_mlp():
    """GPT-2's MLP has one input matrix: the plan says so, as the conversion does."""
    with pytest.raises(JobError, match="one input matrix"):
        plan(GPT2, target="gate_up")


def test_settings_of_the_other_variant_are_idle():
    """A scale means nothing to outer products, nor a number of components to a diagonal core."""
    job = Job(model="tiny", method="npt", npt=Npt(variant="outer"))
    (note,) = notes_on(job, ["npt.modulation_scale", "npt.components"])
    assert "`npt.modulation_scale` has no effect" in note
    linear = Job(model="tiny", method="npt", npt=Npt(variant="linear"))
    notes = notes_on(linear, ["npt.modulation_scale", "npt.components", "npt.temperature"])
    assert len(notes) == 3
    asks = linear.replace(**{"train.sample_prompts": 2})
    assert "`data.eval`" in notes_on(asks, ["train.sample_prompts"])[0]


def test_what_cannot_be_is_refused():
    """A diagonal core that reads the last matrix's input; a share above 1; more new tokens than there is room for."""
    train = Train(sample_prompts=1, sample_tokens=64)
    (conflict,) = check_job(Job(model="tiny", max_seq_len=64, train=train))
    assert "train.sample_tokens" in conflict.fields
    for npt, field in (
        (Npt(target="all"), "npt.target"),
        (Npt(objective="end_to_end", logits_weight=1.5), "npt.logits_weight"),
    ):
        (conflict,) = check_job(Job(model="tiny", method="npt", max_seq_len=64, npt=npt))
        assert field in conflict.fields
    job = Job(
        model="tiny", method="npt", npt=Npt(objective="end_to_end", logits_weight=0.5, quantized_base=True)
    )
    assert not check_job(job)
    (conflict,) = check_job(job.replace(**{"quantization.skip": ()}))
    assert "quantization.skip" in conflict.fields


def test_end_to_end_training_keeps_the_graphs_of_all_blocks():
    """More memory than layer by layer, the more blocks are converted; sharding and checkpointing are refused."""
    activations = {
        (objective, layers): next(
            line.bytes
            for line in plan(objective=objective, layers=layers).budget
            if line.category == "activations"
        )
        for objective in ("layer", "end_to_end")
        for layers in ((4, 5), "all")
    }
    assert activations["end_to_end", "all"] > 2 * activations["end_to_end", (4, 5)]
    assert activations["end_to_end", (4, 5)] > activations["layer", (4, 5)]
    job = Job(model="tiny", method="npt", npt=Npt(objective="end_to_end"), activation_checkpointing="full")
    (conflict,) = check_job(job)
    assert "activation_checkpointing" in conflict.fields
    sharded = job.replace(
        activation_checkpointing="none", **{"parallel.strategy": "FULL_SHARD", "parallel.dp_shard": 2}
    )
    (conflict,) = check_job(sharded)
    assert "parallel.strategy" in conflict.fields


def test_a_4bit_base_is_a_field_of_the_job():
    """`npt.quantized_base` plans packed weights, makes `quantization` count, and rules out peft's preparation."""
    plain, packed = (
        next(line.bytes for line in plan(quantized_base=quantized).budget if line.category == "weights")
        for quantized in (False, True)
    )
    linears = 6 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 176)
    assert linears * 3.5 == pytest.approx(plain - packed, rel=0.01)
    job = Job(model="tiny", method="npt", npt=Npt(quantized_base=True))
    (note,) = notes_on(job, ["quantization.type", "quantization.kbit_preparation"])
    assert "`quantization.kbit_preparation` has no effect with `method: npt`" in note
    prepared = Quantization(kbit_preparation=True)
    assert plan(quantized_base=True).need_bytes == plan(quantization=prepared, quantized_base=True).need_bytes
