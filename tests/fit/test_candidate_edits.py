"""Which changes a job is offered, and what they leave alone."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_estimator import JOB, QWEN_7B

from memplan.fit.changes import candidate_edits
from memplan.fit.lattice import AS_IS
from memplan.job.check import check_job
from memplan.job.spec import OPTIMIZERS, STRATEGIES, Job
from strategies import agreeing

SHALLOW = dataclasses.replace(QWEN_7B, num_hidden_layers=8)
GPT2 = dataclasses.replace(
    QWEN_7B,
    name="gpt2",
    family="gpt2",
    num_hidden_layers=12,
    max_position_embeddings=1024,
    attention_bias=False,
)


def edits(job, architecture=QWEN_7B, **options):
    """All edits offered, by name."""
    dimensions = candidate_edits(job, architecture, **options)
    return {edit.name: edit for dimension in dimensions for edit in dimension.options[1:]}


def with_setting(offered, field):
    """The values that some edit gives to a field."""
    return [edit.set[field] for edit in offered.values() if field in edit.set]


@st.composite
def jobs(draw):
    """Jobs that are in order, of all methods, loops and strategies."""
    strategy = draw(st.sampled_from(STRATEGIES))
    copies = {"NO_SHARD": (1, 2), "HYBRID_SHARD": (2,)}.get(strategy, (1,))
    job = Job(
        model="any",
        method=draw(st.sampled_from(("full", "lora", "qlora", "npt"))),
        dtype=draw(st.sampled_from(("float32", "bfloat16", "float16"))),
        autocast=draw(st.sampled_from((None, "bfloat16"))),
        micro_batch_size=draw(st.integers(1, 24)),
        gradient_accumulation_steps=draw(st.integers(1, 12)),
        max_seq_len=draw(st.integers(1, 9000)),
        activation_checkpointing=draw(st.sampled_from(("none", "selective", "full"))),
        activation_offload=draw(st.booleans()),
        attention=draw(st.sampled_from(("eager", "sdpa", "flash_attention_2"))),
        loss=draw(st.sampled_from(("full", "chunked", "fused"))),
        optimizer=draw(st.sampled_from(OPTIMIZERS)),
        optimizer_kernel=draw(st.sampled_from(("foreach", "fused", "loop"))),
        loop=draw(st.sampled_from(("memplan", "hf_trainer", "script"))),
    ).replace(
        **{
            "lora.rank": draw(st.integers(1, 256)),
            "lora.dtype": draw(st.sampled_from(("float32", "bfloat16"))),
            "lora.target_modules": draw(
                st.sampled_from(
                    ("all-linear", ("q_proj", "v_proj"), ("q_proj", "o_proj", "up_proj"), ("up_proj",))
                )
            ),
            "npt.layers": draw(st.sampled_from(("all", "upper_half", (1, 2, 5)))),
            "npt.form": draw(st.sampled_from(("factored", "materialised"))),
            "quantization.double_quant": draw(st.booleans()),
            "quantization.kbit_preparation": draw(st.booleans()),
            "parallel.strategy": strategy,
            "parallel.dp_shard": 1 if strategy == "NO_SHARD" else draw(st.sampled_from((2, 4))),
            "parallel.dp_replicate": draw(st.sampled_from(copies)),
            "offload.params": draw(st.booleans()),
            "offload.optimizer": draw(st.booleans()),
            "allocator.expandable_segments": draw(st.booleans()),
            "allocator.max_split_size_mb": draw(st.sampled_from((None, 128))),
        }
    )
    return agreeing(job)


@settings(max_examples=200, deadline=None)
@given(jobs())
def test_every_edit_changes_the_job_and_says_what_it_costs(job):
    """No edit repeats what the job has; each has a tier, a slowdown of at least 1, a name and a sentence."""
    for name, edit in edits(job, SHALLOW, allow_capacity=True).items():
        assert job != job.replace(**edit.set), name
        assert edit.tier in range(5)
        assert edit.slowdown >= 1
        assert edit.num_changes >= 1
        assert edit.summary
        assert (edit.given_up > 0) == (edit.tier >= 3)


@settings(max_examples=200, deadline=None)
@given(jobs())
def test_dimensions_edit_disjoint_fields(job):
    """Edits of different dimensions can always be combined, and names tell all edits apart."""
    dimensions = candidate_edits(job, SHALLOW, allow_capacity=True)
    fields = [{field for edit in dimension.options for field in edit.set} for dimension in dimensions]
    names = [edit.name for dimension in dimensions for edit in dimension.options[1:]]

    assert all(AS_IS == dimension.options[0] for dimension in dimensions)
    assert all(not one & other for one, other in itertools.combinations(fields, 2))
    assert len(set(names)) == len(names)


@settings(max_examples=200, deadline=None)
@given(jobs())
def test_global_batch_and_gpus_are_kept(job):
    """Every edit, of whatever tier, leaves the global batch and the number of GPUs as they are."""
    for edit in edits(job, SHALLOW, allow_capacity=True).values():
        changed = job.replace(**edit.set)

        assert job.global_batch_size == changed.global_batch_size
        assert job.world_size == changed.world_size


@settings(max_examples=200, deadline=None)
@given(jobs())
def test_every_edit_of_a_valid_job_gives_a_valid_job(job):
    """What is offered can be written to a job file and read back."""
    assert [] == check_job(job)

    for name, edit in edits(job, SHALLOW, allow_capacity=True).items():
        assert [] == check_job(job.replace(**edit.set)), name


@settings(max_examples=200, deadline=None)
@given(jobs())
def test_only_tier_3_shortens_and_only_tier_4_shrinks_what_is_trained(job):
    """Sequences and what is trained stay in the tiers that do not say otherwise."""
    capacity = ("lora.rank", "lora.target_modules", "npt.layers", "npt.rank")
    for edit in edits(job, SHALLOW, allow_capacity=True).values():
        assert (3 == edit.tier) == ("max_seq_len" in edit.set)
        assert (4 == edit.tier) == any(field in edit.set for field in capacity)
    assert all(edit.tier < 4 for edit in edits(job, SHALLOW).values())


def test_micro_batches_are_all_divisors_of_the_global_batch():
    """6 x 4 sequences can go 4, 3, 2 or 1 at a time, but not 5."""
    offered = edits(JOB.replace(micro_batch_size=6, gradient_accumulation_steps=4))

    assert [4, 3, 2, 1] == with_setting(offered, "micro_batch_size")
    assert [6, 8, 12, 24] == with_setting(offered, "gradient_accumulation_steps")


@pytest.mark.parametrize(
    ("loop", "expected"),
    [("memplan", ["chunked", "fused"]), ("hf_trainer", ["chunked", "fused"]), ("script", ["fused"])],
)
def test_losses_that_a_loop_can_run(loop, expected):
    """A chunked loss needs our loop or TRL; Liger's kernel can be put under any."""
    assert expected == with_setting(edits(JOB.replace(loop=loop)), "loss")


def test_the_loss_that_takes_nothing_more_is_preferred():
    """Our loop prefers its own chunked loss, transformers' Trainer the one that is a flag."""
    ours, trainer = edits(JOB), edits(JOB.replace(loop="hf_trainer"))

    assert ours["chunked loss"].slowdown < ours["fused loss"].slowdown
    assert trainer["fused loss"].slowdown < trainer["chunked loss"].slowdown
    assert "TRL" in trainer["chunked loss"].summary
    assert "use_liger_kernel" in trainer["fused loss"].summary


def test_a_loss_in_place_is_not_offered_again():
    """Neither with a chunked or fused loss, nor where local NPT training computes no logits."""
    for job in (JOB.replace(loss="chunked"), JOB.replace(loss="fused"), JOB.replace(method="npt")):
        assert [] == with_setting(edits(job), "loss")


def test_only_lora_is_offered_a_4_bit_base():
    """4 bits need a frozen base that has adapters."""
    assert ["qlora"] == with_setting(edits(JOB), "method")
    for method in ("full", "qlora", "npt"):
        assert [] == with_setting(edits(JOB.replace(method=method)), "method")


def test_adapters_follow_a_bfloat16_base_only():
    """bfloat16 adapters on a float32 base would only add casts; both change together there."""
    base = JOB.replace(dtype="float32")

    assert ["bfloat16"] == with_setting(edits(JOB), "lora.dtype")
    assert {"dtype": "bfloat16", "lora.dtype": "bfloat16"} == edits(base)["bfloat16 weights and adapters"].set
    assert "bfloat16 adapters" not in edits(base)


def test_one_gpu_is_offered_no_sharding():
    """Sharding is over GPUs that the job has: on one, only the host is left."""
    assert [] == with_setting(edits(JOB), "parallel.strategy")
    assert {"offload.params": True} == edits(JOB)["parameter offload"].set


def test_the_trainer_offloads_under_fsdp_and_deepspeed_only():
    """On one GPU transformers' Trainer keeps neither parameters nor the optimizer on the host."""
    alone = JOB.replace(loop="hf_trainer")
    sharded = alone.replace(**{"parallel.strategy": "ZERO_2", "parallel.dp_shard": 2})

    assert [] == with_setting(edits(alone), "offload.params") + with_setting(
        edits(alone), "offload.optimizer"
    )
    assert [True] == with_setting(edits(JOB), "offload.optimizer")
    assert [True] == with_setting(edits(sharded), "offload.optimizer")


def test_data_parallel_gpus_are_sharded_over():
    """Eight replicas become eight shards; nothing of the kind is offered twice."""
    job = JOB.replace(**{"parallel.dp_replicate": 8})
    full = edits(job)["full shard"].set

    assert {"parallel.strategy": "FULL_SHARD", "parallel.dp_shard": 8, "parallel.dp_replicate": 1} == full
    assert "full shard" not in edits(job.replace(**full))
    assert {"offload.params": True} == edits(job.replace(**full))["parameter offload"].set


def test_an_8_bit_base_has_4_bits_left_and_is_not_sharded():
    """LLM.int8() runs in stages 1 and 2 of ZeRO, and under no FSDP; from 16 bits 4 are offered, whatever the type."""
    job = JOB.replace(method="qlora", **{"quantization.type": "int8", "quantization.double_quant": False})
    offered = edits(job.replace(**{"parallel.dp_replicate": 4}))

    assert {"quantization.type": "nf4"} == offered["4-bit base"].set
    assert not {"full shard", "gradient shard", "parameter offload", "double quantisation"} & set(offered)
    stages = job.replace(**{"parallel.strategy": "ZERO_1", "parallel.dp_shard": 4, "loop": "hf_trainer"})
    assert ["ZERO_2"] == with_setting(edits(stages), "parallel.strategy")
    assert {"method": "qlora", "quantization.type": "nf4"} == edits(job.replace(method="lora"))[
        "4-bit base"
    ].set


def test_checkpoints_of_an_8_bit_base_are_reentrant_where_a_loop_has_such():
    """Others hold the inputs of its layers all the same; our own loop has no others."""
    job = JOB.replace(method="qlora", activation_checkpointing="none", **{"quantization.type": "int8"})
    trainer = job.replace(loop="hf_trainer")

    assert {"activation_checkpointing": "full"} == edits(job)["full checkpointing"].set
    full = edits(trainer)["full checkpointing"].set
    assert {"activation_checkpointing": "full", "use_reentrant": True} == full
    checkpointed = trainer.replace(activation_checkpointing="full")
    assert {"use_reentrant": True} == edits(checkpointed)["reentrant checkpointing"].set
    assert "reentrant checkpointing" not in edits(checkpointed.replace(use_reentrant=True))
    assert not [name for name in edits(trainer.replace(**full)) if "activation" in name]


def test_a_4_bit_base_is_sharded_by_what_it_is_stored_in():
    """accelerate's FSDP2 shards no bytes; our own does."""
    job = JOB.replace(method="qlora", loop="hf_trainer", **{"parallel.dp_replicate": 4})
    full = edits(job)["full shard"].set
    assert full["quantization.storage"] == job.dtype
    assert "quantization.storage" not in edits(job.replace(loop="memplan"))["full shard"].set

    whole = job.replace(**{**full, "quantization.storage": "uint8"})
    assert edits(whole)["sharded 4-bit base"].set == {"quantization.storage": job.dtype}
    assert "sharded 4-bit base" not in edits(job.replace(**full))
    lora = edits(whole.replace(method="lora"))["4-bit base"].set
    assert lora == {"method": "qlora", "quantization.storage": job.dtype}


def test_quantised_states_need_whole_parameters():
    """bitsandbytes' optimizers are offered without sharding, and sharding is not offered with them."""
    sharded = JOB.replace(**{"parallel.strategy": "FULL_SHARD", "parallel.dp_shard": 2})
    quantised = JOB.replace(optimizer="adamw_8bit", **{"parallel.dp_replicate": 2})

    assert ["adamw_8bit", "paged_adamw_8bit", "paged_adamw"] == with_setting(edits(JOB), "optimizer")
    assert [] == with_setting(edits(sharded), "optimizer")
    assert [] == with_setting(edits(quantised), "parallel.strategy")


def test_expandable_segments_replace_the_split_size():
    """The two together are harmful, so one edit drops one and sets the other."""
    job = JOB.replace(**{"allocator.expandable_segments": False, "allocator.max_split_size_mb": 128})
    pair = job.replace(**{"allocator.expandable_segments": True})

    assert {"allocator.max_split_size_mb": None, "allocator.expandable_segments": True} == edits(job)[
        "allocator"
    ].set
    assert {"allocator.max_split_size_mb": None} == edits(pair)["allocator"].set
    assert "allocator" not in edits(JOB)


def test_offload_of_block_inputs_comes_with_checkpointing():
    """Without checkpointing there are none, so the edit turns both on and counts as two changes."""
    bare = edits(JOB.replace(activation_checkpointing="none"))["activation offload"]
    checkpointed = edits(JOB)["activation offload"]

    assert {"activation_offload": True, "activation_checkpointing": "full"} == bare.set
    assert (2, 1) == (bare.num_changes, checkpointed.num_changes)


def test_sequences_get_shorter_in_steps():
    """Down to an eighth, in multiples of 64, each giving up the share that it cuts."""
    offered = edits(JOB)

    assert [1536, 1024, 768, 512, 384, 256] == with_setting(offered, "max_seq_len")
    assert 0.25 == offered["max_seq_len 1536"].given_up
    assert [] == with_setting(edits(JOB.replace(max_seq_len=64)), "max_seq_len")


def test_rank_halves_with_its_scale():
    """alpha / rank stays what it was."""
    offered = edits(JOB, allow_capacity=True)

    assert [64, 32, 16, 8, 4] == with_setting(offered, "lora.rank")
    assert [128, 64, 32, 16, 8] == with_setting(offered, "lora.alpha")


def test_target_modules_shrink_to_attention():
    """All linear layers, then attention, then query and value; from a list, only what it has."""
    listed = JOB.replace(**{"lora.target_modules": ("o_proj", "down_proj")})

    assert [("q_proj", "k_proj", "v_proj", "o_proj"), ("q_proj", "v_proj")] == with_setting(
        edits(JOB, allow_capacity=True), "lora.target_modules"
    )
    assert [("o_proj",)] == with_setting(edits(listed, allow_capacity=True), "lora.target_modules")


def test_targets_of_gpt2_do_not_reach_its_mlp():
    """`c_proj` is in attention and in the MLP, so the target says which."""
    offered = edits(JOB, GPT2, allow_capacity=True)

    assert [("c_attn", "attn.c_proj")] == with_setting(offered, "lora.target_modules")


def test_npt_blocks_halve_from_below():
    """The upper half stays, then the upper quarter, then one."""
    job = JOB.replace(method="npt", **{"npt.layers": (3, 10, 16, 17, 18)})

    assert [(17, 18), (18,)] == with_setting(edits(job, allow_capacity=True), "npt.layers")
