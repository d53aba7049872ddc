"""What `lora.target_modules` may be: names, a pattern, or what other trainers make of either."""

from __future__ import annotations

from typing import Any

import pytest
from foreign_files import AXOLOTL_LORA, TRL, values

from memplan.errors import JobError
from memplan.job.spec import Job
from memplan.job.targets import matches
from memplan.model import resolve_model
from memplan.tape.targets import check_targets, targets_by_block


@pytest.mark.parametrize(
    ("base", "wanted", "expected"),
    [
        (AXOLOTL_LORA | {"lora_target_linear": None}, r"model.layers.[\d]+.(mlp|attn).c_proj", None),
        (AXOLOTL_LORA | {"lora_target_linear": None}, ["attn.c_proj", "c_fc"], ("attn.c_proj", "c_fc")),
        (TRL | {"use_peft": True}, [r".*\.c_(attn|fc)"], r".*\.c_(attn|fc)"),
        (TRL | {"use_peft": True}, ["c_attn", ".*c_fc"], ("c_attn", ".*c_fc")),
    ],
)
def test_one_text_is_a_pattern_and_a_list_is_of_names(base: dict[str, Any], wanted: Any, expected: Any):
    """As peft takes them; TRL takes a single text out of its list."""
    assert [expected or wanted] == values(base | {"lora_target_modules": wanted}, "lora.target_modules")


def test_layers_to_transform_are_those_of_peft():
    """A name has an adapter in the same blocks as by peft's own function."""
    peft = pytest.importorskip("peft")
    from peft.tuners.tuners_utils import check_target_module_exists

    names, layers = ["c_attn", "mlp.c_proj"], [0, 2, 11]
    more = {"lora_target_linear": None, "lora_target_modules": names, "peft_layers_to_transform": layers}
    [pattern] = values(AXOLOTL_LORA | more, "lora.target_modules")
    config = peft.LoraConfig(target_modules=names, layers_to_transform=layers)
    modules = [
        f"{prefix}.{layer}.{name}"
        for prefix in ("transformer.h", "model.language_model.layers")
        for layer in range(12)
        for name in ("attn.c_attn", "attn.c_proj", "mlp.c_proj", "mlp.experts.2.c_attn", "c_attn")
    ]
    expected = [name for name in modules if check_target_module_exists(config, name)]
    assert expected == [name for name in modules if matches(pattern, name)]
    assert 0 < len(expected) < len(modules)


def planned(wanted: Any, model: str = "llama-3.1-8b") -> Job:
    """A job with these targets."""
    return Job(model=model).replace(**{"lora.target_modules": wanted})


def test_blocks_with_other_layers_are_told_apart():
    """By a pattern or by names with a number; where all have the same there is nothing to tell."""
    llama = resolve_model("llama-3.1-8b")
    some = targets_by_block(planned(r".*\.(0|31)\.mlp\.(up|down)_proj"), llama)

    assert some is not None and len(some) == 32
    assert some[0] == some[31] == ("mlp.up_proj", "mlp.down_proj") and some[1:31] == [()] * 30
    assert targets_by_block(planned(r"model\.layers\.[\d]+\.mlp\.(up|down)_proj"), llama) is None
    assert targets_by_block(planned(("layers.3.mlp.up_proj",)), llama)[3] == ("mlp.up_proj",)
    assert targets_by_block(planned(("up_proj",)), llama) is None


@pytest.mark.parametrize(
    ("model", "wanted", "words"),
    [
        ("llama-3.1-8b", r".*self_attn.*", "also matches `model.layers.0.self_attn`"),
        ("llama-3.1-8b", r".*mlp\..*", "also matches `model.layers.0.mlp.act_fn`"),
        ("llama-3.1-8b", r".*\.7\..*norm|.*q_proj", "also matches `model.layers.7.input_layernorm`"),
        ("llama-3.1-8b", r"language_model\..*q_proj", "matches no layer of `llama-3.1-8b` as it is planned"),
        ("llama-3.1-8b", r".*embed_tokens|.*q_proj", "adapters on embeddings are not planned"),
        ("mixtral-8x7b", r".*\.(q|v)_proj", "not planned by shape"),
    ],
)
def test_what_peft_would_not_adapt_is_refused(model: str, wanted: str, words: str):
    """With what it is and a remedy."""
    with pytest.raises(JobError) as refused:
        check_targets(planned(wanted, model), resolve_model(model))

    assert words in refused.value.message
    assert refused.value.hint
