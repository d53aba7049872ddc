"""A process that only traces does without much of what it imports, can still have it, and sees the same events."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from memplan.tracing import sizes
from memplan.tracing.writer import trace_job
from tracing.tiny import CONFIGS, job

JOBS = [
    ("llama", {"method": "lora", "activation_checkpointing": "full"}),
    ("gpt2", {"dtype": "float32", "autocast": "bfloat16", "lora__dropout": 0.1, "method": "lora"}),
    ("mixtral", {"attention": "eager", "loop": "hf_trainer"}),
    ("bert", {"loop": "script"}),
]
"""Models and what their jobs say."""
if find_spec("bitsandbytes"):
    JOBS.append(("llama", {"method": "qlora"}))

TRACES = """
import json, sys
from memplan.tracing.lean import without_the_unused

with without_the_unused(alone=True):
    from tracing.test_lean import JOBS, digest

    first = digest(*JOBS[0])
    unused = ("torch._dynamo.eval_frame", "sympy.core", "torch.distributed.tensor", "torch.distributed.fsdp")
    imported = [name for name in unused if name in sys.modules]
    print(json.dumps([first, *[digest(*job) for job in JOBS[1:]]]))
    print(json.dumps(imported))
"""

COMPILER = """
import sys
from memplan.tracing.lean import without_the_unused

with without_the_unused():
    import torch
    from torch.utils.checkpoint import checkpoint

    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    checkpoint(layer, torch.ones(1, 2), use_reentrant=False).sum().backward()
    optimizer.step()
    torch.ones(2, device="meta") + torch.ones(2, device="meta")
    print("torch._dynamo.eval_frame" in sys.modules, "sympy.core" in sys.modules)
    if "ask" in sys.argv:
        print(torch._dynamo.is_compiling(), "torch._dynamo.eval_frame" in sys.modules)
        x = torch.ones(2)
        print(float(torch.cond(x.sum() > 1, lambda x: x + 1, lambda x: x * 2, (x,))[0]))
import sympy, torch._dynamo
print(hasattr(torch._dynamo, "optimize"), torch.export.Dim("x") is not None, sympy.Basic is type(sympy.S(1)).mro()[-4])
"""

NAMES = """
import json
from memplan.tracing.lean import without_the_unused

with without_the_unused():
    import transformers
    from transformers.utils import import_utils
    found = []
    for name in ("BloomPreTrainedModel", "Trainer", "LlamaConfig", "Qwen2_5OmniTextConfig", "nothing"):
        value = getattr(transformers, name, None)
        # Whether it has been found without reading everything.
        found.append([name, getattr(value, "__module__", None), "_unread" in vars(transformers)])
    print(json.dumps(found))
    print(json.dumps([sorted(transformers.__all__), sorted(dir(transformers.models))]))
"""


def digest(model: str, fields: dict[str, object]) -> str:
    """Every event of a job's trace, with its bytes and what is allocated."""
    traced = trace_job(job(**fields), CONFIGS[model])
    tape = traced.flatten()
    described = [str(traced.describe(event)) for event in tape.events if event > 0]
    return hashlib.sha256(repr((tape.events, tape.sizes, described)).encode()).hexdigest()


def run(script: str, *arguments: str) -> list[str]:
    """The lines that the script prints, in a process of its own."""
    command = [sys.executable, "-c", script, *arguments]
    tests = str(Path(__file__).parents[1])
    path = os.pathsep.join([tests, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=dict(os.environ, PYTHONPATH=path)
    )
    assert 0 == done.returncode, done.stderr
    return done.stdout.splitlines()


def test_its_events_are_those_of_a_whole_process():
    """With the same names, shapes and categories; and a LoRA job, the first, does without the unused."""
    events, imported = map(json.loads, run(TRACES))
    assert [digest(*each) for each in JOBS] == events
    assert [] == imported


def test_checkpoints_optimizers_and_meta_kernels_do_without_compiler_and_sympy():
    """Asked later, they are there."""
    assert ["False False", "True True True"] == run(COMPILER)


def test_the_real_compiler_comes_when_more_is_asked_of_it():
    """And operators of higher order, and sympy with them."""
    assert ["False False", "False True", "2.0", "True True True"] == run(COMPILER, "ask")


def test_names_of_transformers_are_the_same_and_found_in_few_files():
    """All of them are read for a name that does not begin with its folder's, or that nothing has."""
    found, names = map(json.loads, run(NAMES))
    transformers = importlib.import_module("transformers")
    assert [
        ["BloomPreTrainedModel", "transformers.models.bloom.modeling_bloom", True],
        ["Trainer", "transformers.trainer", True],
        ["LlamaConfig", "transformers.models.llama.configuration_llama", True],
    ] == found[:3]
    omni = getattr(transformers, found[3][0], None)
    assert [found[3][0], getattr(omni, "__module__", None), False] == found[3]
    assert ["nothing", None, False] == found[4]
    assert sorted(transformers.__all__) == names[0]
    modules = {path.stem for path in Path(transformers.__path__[0]).glob("*.py")}
    assert not modules & (set(transformers.models.__all__) - set(transformers._import_structure))
    assert set(transformers.models.__all__) <= set(names[1])


ASKED = [
    ("guard_or_false", (True,)),
    ("guard_or_true", (False,)),
    ("statically_known_true", (False,)),
    ("sym_and", (True, True, False)),
    ("sym_and", (True,)),
    ("sym_or", (False, True)),
    ("sym_or", (False,)),
    ("sym_eq", (3, 4)),
    ("sym_eq", ((3, 4), [3, 4])),
    ("sym_eq", ([3, 4], [3])),
    ("sym_eq", ([], [])),
    ("is_nested_int", (3,)),
    ("has_guarding_hint", (3,)),
    ("guarding_hint_or_throw", (3,)),
    ("has_hint", (3,)),
    ("size_hint", (3,)),
    ("guard_int", (3,)),
    ("guard_size_oblivious", (False,)),
    ("expect_true", (False,)),
]


@pytest.mark.filterwarnings("ignore:guard_size_oblivious will be removed:FutureWarning")
@pytest.mark.parametrize(("name", "values"), ASKED)
def test_conditions_on_sizes_are_torch_s(name, values):
    """Of numbers, without asking torch."""
    theirs = getattr(importlib.import_module(sizes.MODULE), name, None)
    if theirs is None:
        pytest.skip("this torch has another name for it")
    assert theirs(*values) == sizes.ANSWERS[name].__wrapped__(*values)


def test_every_condition_is_compared():
    """But that on tensors, which is compared below."""
    assert {name for name, _ in ASKED} == set(sizes.ANSWERS) - {"free_unbacked_symbols"}


def test_what_is_no_number_is_asked_of_torch():
    """It refuses what it does not know, and finds the symbols of sizes that are not numbers."""
    torch = importlib.import_module("torch")
    shapes = importlib.import_module(sizes.MODULE)
    with pytest.raises(AssertionError):
        sizes.ANSWERS["sym_eq"](1, "a")
    with pytest.raises(AssertionError):
        sizes.ANSWERS["guard_or_false"](1)
    plain = torch.empty(2, 3, device="meta")
    assert shapes.free_unbacked_symbols(plain) == sizes.ANSWERS["free_unbacked_symbols"](plain)
    size = shapes.ShapeEnv().create_unbacked_symint()
    assert 1 == len(sizes.ANSWERS["free_unbacked_symbols"](size))
    assert sizes.ANSWERS["is_nested_int"](size) is False
