"""Streamed weights: the same model as transformers loads, in no more RAM than a file and what stays."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

from resident import CAN_TELL  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_runs import GPT2, LLAMA  # noqa: E402

import memplan  # noqa: E402
from memplan.errors import ModelError  # noqa: E402
from memplan.job.spec import Job, Load, Lora  # noqa: E402
from memplan.tape.packing import cpu_packing_scratch  # noqa: E402
from memplan.train.build import Built, build_model  # noqa: E402
from memplan.train.stream import find_files, load_streamed  # noqa: E402

pytestmark = pytest.mark.torch

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])
MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 260,
    "num_local_experts": 3, "num_experts_per_tok": 2, "max_position_embeddings": 64,
}  # fmt: skip
TIED = LLAMA | {"tie_word_embeddings": True}


def _saved(folder: Path, config: dict[str, Any], **options: Any) -> Any:
    """A random model of transformers, saved in `folder`."""
    torch.manual_seed(0)
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    resolved = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model = transformers.AutoModelForCausalLM.from_config(resolved)
    model.save_pretrained(folder, **options)
    return model.eval()


def _load(folder: Path, method: str = "full", **changes: Any) -> Built:
    job = Job(model=str(folder), method=method, dtype="float32", lora=Lora(rank=4)).replace(**changes)
    config = json.loads((folder / "config.json").read_text())
    return build_model(job, config, torch.device("cpu"), weights_path=str(folder))


@pytest.mark.parametrize("config", [LLAMA, TIED, GPT2, MIXTRAL], ids=["llama", "tied", "gpt2", "mixtral"])
@pytest.mark.parametrize("size", ["20KB", "5GB"])
def test_streamed_weights_are_those_that_transformers_loads(
    tmp_path: Path, config: dict[str, Any], size: str
) -> None:
    """In one file or many, tied, under other names, or with the experts of a block one by one in the files."""
    _saved(tmp_path, config, max_shard_size=size)
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    built = _load(tmp_path)

    actual = built.model.state_dict()
    assert (len(find_files(str(tmp_path))) > 3) == (size == "20KB")
    assert set(actual) == set(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(actual[name], tensor), name
    for (name, buffer), (_, other) in zip(built.model.named_buffers(), expected.named_buffers(), strict=True):
        assert torch.equal(buffer, other), name
    logits = expected.eval()(input_ids=IDS).logits
    assert torch.equal(built.model.eval()(input_ids=IDS).logits, logits)


def test_experts_come_together_from_several_files(tmp_path: Path) -> None:
    """The checkpoint has a tensor per expert, as the model's authors published it, scattered over files."""
    _saved(tmp_path, MIXTRAL)
    tensors = load_file(tmp_path / "model.safetensors")
    assert any(".experts.2." in name for name in tensors), "transformers saves experts one by one"
    expected = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    (tmp_path / "model.safetensors").unlink()
    parts: list[dict[str, Any]] = [{}, {}, {}]
    for index, name in enumerate(sorted(tensors)):
        parts[index % 3][name] = tensors[name]
    weight_map = {}
    for index, part in enumerate(parts):
        file = f"model-{index + 1:05d}-of-00003.safetensors"
        save_file(part, tmp_path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index_text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index_text)

    actual = _load(tmp_path).model.state_dict()

    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


def test_a_tensor_is_given_once_and_lies_in_its_file(tmp_path: Path) -> None:
    """`place` gets each name once, in the order of the files, and nothing that the model has no name for."""
    model = _saved(tmp_path, LLAMA, max_shard_size="20KB")
    placed: list[str] = []
    names = [name for name in model.state_dict() if "layers.1" not in name]

    load_streamed(model, names, find_files(str(tmp_path)), lambda name, tensor: placed.append(name))

    assert sorted(placed) == sorted(names)


def test_other_formats_are_built_in_ram_first(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A checkpoint without safetensors is loaded by transformers and said so; so is one that shall not be streamed."""
    model = _saved(tmp_path, LLAMA)
    plain = _load(tmp_path, load=Load(ram_efficient=False))
    assert torch.equal(plain.head.weight, model.lm_head.weight)
    assert "note" not in capfd.readouterr().err
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")

    built = _load(tmp_path)

    assert torch.equal(built.head.weight, model.lm_head.weight)
    assert "no safetensors files" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "lack `model.norm.weight`"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}), r"is \(7,\), not \(32,\)"),
    ],
    ids=["missing", "shape"],
)
def test_weights_of_another_model_are_refused(tmp_path: Path, change: Any, words: str) -> None:
    """A tensor that is missing or of another shape is named."""
    _saved(tmp_path, LLAMA)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ModelError, match=words):
        _load(tmp_path)


def test_a_file_that_was_cut_off_is_refused(tmp_path: Path) -> None:
    """A download that ended early is an explained error."""
    _saved(tmp_path, LLAMA)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])

    with pytest.raises(ModelError, match="cannot be read"):
        _load(tmp_path)


BIG = LLAMA | {
    "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 7, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32000,
}  # fmt: skip


MEASURE = """
import json, sys
from functools import partial
from pathlib import Path
import torch
from resident import peak_growth
from memplan.job.spec import Job
from memplan.train.build import build_model
from memplan.train.measure import storage_bytes

folder = sys.argv[1]
config = json.loads((Path(folder) / "config.json").read_text())
small = config | {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "vocab_size": 300}

def build(config, weights_path, method):
    return build_model(Job(model=folder, method=method), config, torch.device("cpu"), weights_path=weights_path)

for method in ("lora", "qlora"):
    build(small, None, method)  # imports all there is to import
    grown, built = peak_growth(partial(build, config, folder, method))
    print(method, grown, storage_bytes([*built.model.parameters(), *built.model.buffers()]))
    del built
"""


@pytest.mark.skipif(not CAN_TELL, reason="the resident set as Linux counts it")
def test_loading_takes_one_file_and_what_stays(tmp_path: Path) -> None:
    """
    A process that loads 296 MiB in nine files grows by at most 1.2 of the largest beside what it keeps; where 4-bit
    weights are packed on the CPU, by what packing one of them takes there.
    """
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(BIG)).to(torch.bfloat16)
    parts: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else name.split(".")[-2].replace("norm", "0")
        parts.setdefault(part, {})[name] = torch.full_like(tensor, 0.01, device="cpu")
    weight_map = {}
    for part, tensors in parts.items():
        save_file(tensors, tmp_path / f"model-{part}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"model-{part}.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (tmp_path / "model.safetensors.index.json").write_text(index)
    (tmp_path / "config.json").write_text(json.dumps(BIG))
    parts.clear()
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    assert sum(sizes) > 290 << 20 and len(sizes) == 9

    path = os.pathsep.join([str(Path(memplan.__file__).parent.parent), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True, text=True, timeout=1800, check=False, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip

    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["lora", "qlora"]
    for method, grown, kept in lines:
        packing = sum(cpu_packing_scratch(1024 * 2816, "bfloat16", "nf4")) if method == "qlora" else 0
        assert 0.95 * int(kept) < int(grown) < int(kept) + 1.2 * max(sizes) + packing, method
