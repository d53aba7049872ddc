"""Every lint fires where it should, says what to do, and is silent otherwise."""

import pytest

from memplan.job.spec import Job
from memplan.model.architecture import Architecture
from memplan.preflight.lints import RULES, Subject, lint, lint_settings

CUDA, SHARED = "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"
ON = "expandable_segments:True"


def architecture(**changes):
    """Llama-2-7B's numbers."""
    numbers = {
        "name": "llama-2-7b", "family": "llama", "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128,
        "vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    }  # fmt: skip
    return Architecture(**{**numbers, **changes})


def job(**changes):
    """A LoRA job about which there is nothing to say, with changes by dotted field."""
    return Job(model="llama-2-7b").replace(**{"lora.dtype": "bfloat16", **changes})


def codes(**subject):
    """Codes of the findings about a subject."""
    return [
        finding.code for finding in lint(Subject(**{"architecture": architecture(), "job": job(), **subject}))
    ]


def others(codes):
    """All but the first finding, less the one that follows whenever the environment has other settings."""
    return [code for code in codes[1:] if code != "allocator-differs"]


CASES = [
    ("split-with-expandable", {"job": job(**{"allocator.max_split_size_mb": 128})}),
    ("collection-with-expandable", {"job": job(**{"allocator.garbage_collection_threshold": 0.8})}),
    ("split-with-expandable", {"environ": {SHARED: f"max_split_size_mb:128,{ON}"}}),
    ("allocator-value", {"environ": {SHARED: "expandable_segments:true"}}),
    ("allocator-differs", {"environ": {SHARED: "backend:cudaMallocAsync"}}),
    ("ignored-variable", {"environ": {SHARED: ON}, "torch_version": "2.9.1"}),
    ("conflicting-variables", {"environ": {SHARED: "backend:native", CUDA: ON}}),
    ("expandable-unsupported", {"platform": "wsl"}),
    ("expandable-unsupported", {"platform": "win32"}),
    ("caching-off", {"environ": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}}),
    ("later-torch", {"torch_version": "2.15.0+cu132"}),
    ("eager-kernels", {"environ": {"CUDA_MODULE_LOADING": "EAGER"}}),
    ("float16-weights", {"job": job(method="full", dtype="float16")}),
    ("float16-scaling", {"job": job(autocast="float16")}),
    ("float16-scaling", {"job": job(dtype="float16")}),
    ("eager-attention", {"job": job(attention="eager")}),
    ("adapter-upcast", {"job": job(**{"lora.dtype": "float32"})}),
    ("kbit-upcast", {"job": job(method="qlora", **{"quantization.kbit_preparation": True})}),
    ("paged-outside-torch", {"job": job(optimizer="paged_adamw_8bit")}),
    ("kernel-unused", {"job": job(optimizer="adamw_8bit", optimizer_kernel="foreach")}),
    ("logits-held", {"job": job(loop="script")}),
    ("beyond-positions", {"job": job(max_seq_len=4097)}),
    ("ram-per-rank", {"job": job(**{"load.ram_efficient": False, "parallel.dp_replicate": 2})}),
    ("npt-materialised", {"job": job(method="npt", **{"npt.form": "materialised"})}),
]


@pytest.mark.parametrize(("code", "subject"), CASES)
def test_a_lint_fires_alone(code, subject):
    """One circumstance, one finding."""
    found = codes(**subject)

    assert code == found[0]
    assert [] == others(found)


SILENT = [
    {},
    {"environ": {SHARED: ON}},
    {"environ": {CUDA: ON}, "torch_version": "2.9.1"},
    {"environ": {CUDA: ON, SHARED: ON}},
    {"environ": {CUDA: ""}},
    {"job": job(**{"allocator.max_split_size_mb": 128, "allocator.expandable_segments": False})},
    {"job": job(**{"allocator.garbage_collection_threshold": 0.8, "allocator.expandable_segments": False})},
    {"job": job(**{"allocator.expandable_segments": False}), "platform": "wsl"},
    {"job": job(attention="flash_attention_2")},
    {"job": job(attention="eager", max_seq_len=512)},
    {"job": job(activation_checkpointing="full", **{"lora.dtype": "float32"})},
    {"job": job(autocast="bfloat16", **{"lora.dtype": "float32"})},
    {"job": job(method="full", **{"lora.dtype": "float32"})},
    {"job": job(method="qlora")},
    {"job": job(max_seq_len=4096)},
    {"job": job(loop="script", loss="chunked")},
    {"job": job(method="npt", **{"npt.rank": 4})},
    {"job": job(**{"load.ram_efficient": False})},
]


@pytest.mark.parametrize("subject", SILENT)
def test_nothing_is_said_about_a_sound_job(subject):
    """A lint that fires without a reason teaches people to ignore all of them."""
    assert [] == codes(**subject)


def test_every_rule_is_exercised():
    """A rule that no case above reaches could be wrong for ever."""
    reached = {
        rule
        for _, subject in CASES
        for rule in RULES
        if list(rule(Subject(**{"architecture": architecture(), "job": job(), **subject})))
    }

    assert set(RULES) == reached


@pytest.mark.parametrize(("code", "subject"), CASES)
def test_findings_read_as_sentences_without_an_architecture(code, subject):
    """Each is a sentence and a remedy without full stops; sizes are left out for an unknown model."""
    findings = lint(Subject(**{"job": job(), **subject, "architecture": None}))

    assert (code != "beyond-positions") == (code in [finding.code for finding in findings])
    for finding in findings:
        assert not finding.message.endswith(".") and not finding.remedy.endswith(".")
        assert str(finding).endswith(f"[{finding.code}]")


def test_sizes_are_worked_out():
    """32 heads, 2 x 2048 x 2048 float32 scores: 1 GiB. 2 x 2048 x 32000 bfloat16 logits: 250 MiB."""
    [eager] = lint(Subject(job(attention="eager", micro_batch_size=2), architecture()))
    [held] = lint(Subject(job(loop="script", micro_batch_size=2), architecture()))

    assert "1.00 GiB" in eager.message
    assert "250.00 MiB" in held.message


def test_the_upcast_counts_what_is_not_quantised():
    """Embedding and head of 32000 x 4096 and 65 norms of 4096, two bytes more each: 500.51 MiB."""
    [upcast] = lint(Subject(job(method="qlora", **{"quantization.kbit_preparation": True}), architecture()))

    assert "500.51 MiB" in upcast.message


def test_gpt2_fails_beyond_its_table():
    """Learned positions are looked up: a longer sequence is an error there, and only untrained elsewhere."""
    gpt2 = architecture(family="gpt2", max_position_embeddings=1024)

    assert any("fail" in finding.message for finding in lint(Subject(job(), gpt2)))


def test_a_string_can_be_linted_by_itself():
    """An allocator string from anywhere gets the same findings, under the name of its source."""
    [finding] = lint_settings("max_split_size_mb:64,expandable_segments:True", "the launcher")

    assert "split-with-expandable" == finding.code
    assert finding.message.startswith("the launcher")
