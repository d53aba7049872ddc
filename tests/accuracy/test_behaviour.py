"""`Behaviour`: what follows from the loop, the card and the versions that a job runs with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memplan.job.spec import Job, Parallel, Quantization
from memplan.tape.behaviour import KERNELS, Behaviour
from memplan.tape.software import (
    CUBLAS_WORKSPACE_BYTES,
    CUBLAS_WORKSPACE_BYTES_HOPPER,
    version_numbers,
)

TRAINER = Job(
    model="x",
    method="lora",
    loop="hf_trainer",
    activation_checkpointing="full",
    attention="flash_attention_2",
)


def behaviour(transformers: str, job: Job = TRAINER, family: str = "llama") -> Behaviour:
    """Of a version of transformers."""
    return Behaviour.for_software(job, {"transformers": transformers}, family=family)


@pytest.mark.parametrize(
    ("version", "shift", "in_forward", "reentrant"),
    [("4.45.2", 1, 1, 1), ("4.48.1", 1, 0, 1), ("4.49.0", 0, 0, 1), ("4.57.1", 0, 0, 1), ("5.8", 0, 0, 0)],
)
def test_the_loss_and_checkpointing_of_aversion_numbers(
    version: str, shift: int, in_forward: int, reentrant: int
):
    """Logits shifted until 4.48, made float32 in forward until 4.45, reentrant checkpointing until 5."""
    old = behaviour(version)

    assert (bool(shift), bool(in_forward), bool(reentrant)) == (
        old.shift_logits,
        old.float_logits,
        old.reentrant,
    )


def test_granite_takes_its_loss_itself_until_4_48():
    """Its `forward` made the logits float32 two versions longer, and sliced no hidden states until then."""
    assert [(True, False), (False, True)] == [
        (granite.float_logits, granite.slices_hidden)
        for granite in (behaviour(version, family="granite") for version in ("4.47.1", "4.48.1"))
    ]


def test_trl_gives_a_prepared_model_its_embedding_back_in_16_bits():
    """With bf16; peft alone leaves it in float32."""
    job = TRAINER.replace(
        method="qlora", autocast="bfloat16", quantization=Quantization(kbit_preparation=True)
    )

    assert [False, True, False] == [
        Behaviour.for_software(asked, versions, family="llama").casts_embedding_back
        for asked, versions in (
            (job, {"peft": "0.13.2"}),
            (job, {"peft": "0.13.2", "trl": "0.11.3"}),
            (job.replace(autocast=None), {"peft": "0.13.2", "trl": "0.11.3"}),
        )
    ]


def test_hidden_states_are_sliced_for_the_head_since_4_45():
    """`hidden_states[:, -num_logits_to_keep:, :]`"""
    assert [False, True, True] == [
        behaviour(version).slices_hidden for version in ("4.44.2", "4.45.2", "5.8")
    ]


def test_key_heads_that_the_caller_repeats():
    """Mistral's flash attention until 4.47; sdpa for every family until 4.53."""
    sdpa = TRAINER.replace(attention="sdpa")

    assert behaviour("4.45.2", family="mistral").repeat_key_heads
    assert not behaviour("4.45.2", family="llama").repeat_key_heads
    assert not behaviour("4.48.1", family="mistral").repeat_key_heads
    assert behaviour("4.53.3", sdpa).repeat_key_heads
    assert not behaviour("5.8", sdpa).repeat_key_heads


def test_fsdp1_is_that_of_sharded_jobs_before_5():
    """One GPU has no units; version 5 shards with FSDP2."""
    sharded = TRAINER.replace(parallel=Parallel(strategy="FULL_SHARD", dp_shard=2))

    assert [False, True, False] == [
        behaviour("4.48.1").fsdp1,
        behaviour("4.48.1", sharded).fsdp1,
        behaviour("5.8", sharded).fsdp1,
    ]


@pytest.mark.parametrize(
    ("version", "masks", "all_rows", "divides"),
    [
        ("4.57.1", "none", False, False),
        ("5.13.0", "sum", True, False),
        ("5.16.1", "sum", True, False),
        ("5.17.0", "products", True, False),
        ("5.18.0", "none", True, False),
        ("5.19.0", "none", True, True),
        ("5.20.0", "none", False, True),
    ],
)
def test_experts_positions_and_tokens_of_aversion_numbers(
    version: str, masks: str, all_rows: bool, divides: bool
):
    """Rows of experts are masked, positions of several rows looked at, and a step's tokens divided."""
    found = behaviour(version)

    assert (masks, all_rows, divides) == (found.expert_masks, found.checks_all_rows, found.divides_tokens)


def test_versions_that_are_not_named_are_those_at_hand():
    """
    Of a source that names none the plan is that of `memplan estimate`; slices matter with an older torch only.
    """
    job = TRAINER.replace(activation_checkpointing="none")
    named = Behaviour.for_software(job, {}, family="llama")

    assert Behaviour.for_job(job) == replace(named, slices_hidden=False)


def test_kernels_and_padding_are_taken_as_given():
    """Every name in KERNELS is a field."""
    given = Behaviour.for_software(TRAINER, {}, family="llama", kernels=KERNELS, padded=True)

    assert all(getattr(given, kernel) for kernel in KERNELS)
    assert given.padding_mask


@pytest.mark.parametrize(
    ("gpu", "capability", "workspace"),
    [
        (None, (8, 0), CUBLAS_WORKSPACE_BYTES),
        ("24GB", (8, 0), CUBLAS_WORKSPACE_BYTES),
        ("Tesla T4", (7, 5), CUBLAS_WORKSPACE_BYTES),
        ("NVIDIA A100-SXM4-80GB", (8, 0), CUBLAS_WORKSPACE_BYTES),
        ("H200", (9, 0), CUBLAS_WORKSPACE_BYTES_HOPPER),
        ("NVIDIA B200", (10, 0), CUBLAS_WORKSPACE_BYTES_HOPPER),
        ("NVIDIA GeForce RTX 5090", (12, 0), CUBLAS_WORKSPACE_BYTES_HOPPER),
    ],
)
def test_the_card_that_a_job_names(gpu: str | None, capability: tuple[int, int], workspace: int):
    """Kernels of sdpa and cuBLAS's workspace follow its compute capability."""
    found = Behaviour.for_job(Job(model="x", gpu=gpu))

    assert (capability, workspace) == (found.compute_capability, found.cublas_workspace_bytes)


@pytest.mark.parametrize(
    ("gpu", "version", "mebibytes"),
    [
        ("H200", "2.11.0", 32),
        ("NVIDIA B200", "2.11.0", 8.125),
        ("NVIDIA B200", "2.12.0", 32),
        ("A100", "2.15.0", 8.125),
    ],
)
def test_blackwell_has_the_workspace_of_hopper_since_torch_2_12(gpu: str, version: str, mebibytes: float):
    """8 MiB and 128 KiB before."""
    found = Behaviour.for_software(TRAINER.replace(gpu=gpu), {"torch": version}, family="llama")

    assert mebibytes * (1 << 20) == found.cublas_workspace_bytes


@pytest.mark.parametrize(
    ("version", "kept"), [("2.8.0", 0), ("2.9.0", 1), ("2.11.0+cu128", 1), ("2.12.0", 0)]
)
def test_cublaslt_keeps_a_workspace_of_its_own_for_a_while(version: str, kept: int):
    """1 MiB in torch 2.9 to 2.11."""
    found = Behaviour.for_software(TRAINER, {"torch": version}, family="llama")

    assert kept << 20 == found.cublaslt_workspace_bytes


def test_the_loop_decides_what_is_held():
    """memplan holds nothing, the Trainer hidden states, a float32 output and a mask, a script its output and cache."""
    jobs = [Job(model="x", loop=loop, autocast="bfloat16") for loop in ("memplan", "hf_trainer", "script")]
    ours, trainer, script = (Behaviour.for_job(job) for job in jobs)

    assert Behaviour() == ours
    held = Behaviour(
        hold_hidden=True, float_output=True, prefetch=True, trainer_scalars=True, mask_in_batch=True
    )
    assert held == trainer
    assert Behaviour(hold_hidden=True, hold_logits=True, use_cache=True) == script


def test_versions_are_compared_as_numbers():
    """A local part does not count, and 4.9 is before 4.45."""
    assert (2, 4, 1) == version_numbers("2.4.1+cu121")
    assert version_numbers("4.9") < version_numbers("4.45.2")


def test_what_bitsandbytes_kept_of_a_4bit_product_until_0_43_2():
    """Its input, with the checkpoints of a transformers of that time."""
    job = TRAINER.replace(method="qlora")

    assert [True, False, False, False] == [
        Behaviour.for_software(job, versions, family="llama").keeps_4bit_input
        for versions in (
            {"transformers": "4.37.2", "bitsandbytes": "0.43.1"},
            {"transformers": "4.37.2", "bitsandbytes": "0.43.2"},
            {"transformers": "4.37.2"},
            {"transformers": "5.8", "bitsandbytes": "0.43.1"},
        )
    ]


def test_adapters_were_added_in_place_until_peft_0_9():
    """Not where the version is that at hand."""
    job = TRAINER.replace(method="lora")

    assert [True, False, False] == [
        Behaviour.for_software(job, versions, family="llama").adds_in_place
        for versions in ({"peft": "0.8.2"}, {"peft": "0.9.0"}, {})
    ]


def test_every_block_of_a_llama_had_rotary_tables_until_4_38():
    """In the dtype that the model was loaded in."""
    assert ["bfloat16", None, None] == [
        behaviour(version, family=family).rotary_tables
        for version, family in (("4.37.2", "llama"), ("4.38.0", "llama"), ("4.37.2", "gpt2"))
    ]
