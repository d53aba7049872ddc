"""Merged adapters: the model of peft, in the files of the base; and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from resident import CAN_TELL, peak_growth  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_runs import FALCON, GPT2, LLAMA, prepared, tiny_job, tokenizer_folder  # noqa: E402

from memplan.cli.main import main  # noqa: E402
from memplan.errors import MemplanError, RunError  # noqa: E402
from memplan.train.grown_files import tensor_offsets  # noqa: E402
from memplan.train.merge import explain, merge  # noqa: E402
from memplan.train.output_folder import JOB_FILE, write_job  # noqa: E402

pytestmark = pytest.mark.torch

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])
TIED = LLAMA | {"tie_word_embeddings": True}


def _base(
    folder: Path, config: dict[str, Any] = LLAMA, dtype: Any = torch.float32, size: str = "5GB"
) -> Path:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    torch.manual_seed(0)
    resolved = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    model = transformers.AutoModelForCausalLM.from_config(resolved, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=size)
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def _adapter(base: Path, folder: Path, **settings: Any) -> Path:
    """An adapter with random matrices, saved by peft; the base is untouched."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)
    adapted.save_pretrained(folder, save_embedding_layers=False)
    return folder


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("config", "size", "settings"),
    [
        (LLAMA, "20KB", {}),
        (
            TIED,
            "5GB",
            {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
        ),
        (GPT2, "20KB", {"fan_in_fan_out": True}),
    ],
    ids=["shards", "patterns", "gpt2"],
)
def test_the_merged_model_is_that_of_peft(
    tmp_path: Path, config: dict[str, Any], size: str, settings: dict[str, Any]
) -> None:
    """Logits of base and adapter together; files, names, dtypes and all other tensors are those of the base."""
    base = _base(tmp_path / "base", config, size=size)
    folder = _adapter(base, tmp_path / "adapter", **settings)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = _logits(plain)
    expected = _logits(peft.PeftModel.from_pretrained(plain, folder))

    merged = merge(folder, tmp_path / "merged")

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not torch.allclose(expected, before, atol=0.1)
    torch.testing.assert_close(_logits(loaded), expected, rtol=1e-4, atol=1e-4)
    files = sorted(path.name for path in base.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "merged").iterdir())
    assert merged.num_files == len([name for name in files if name.endswith(".safetensors")])
    changed = 0
    for file in base.glob("*.safetensors"):
        assert tensor_offsets(file) == tensor_offsets(tmp_path / "merged" / file.name)
        ours = load_file(tmp_path / "merged" / file.name)
        for name, tensor in load_file(file).items():
            assert ours[name].dtype == tensor.dtype
            changed += not torch.equal(ours[name], tensor)
    assert changed == merged.num_layers
    assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.parametrize(
    ("config", "saved", "size"),
    [
        (LLAMA, ["embed_tokens", "lm_head"], "20KB"),
        (TIED, ["embed_tokens", "lm_head"], "20KB"),
        (TIED, ["lm_head"], "5GB"),
        (GPT2, ["wte"], "5GB"),
    ],
    ids=["untied", "tied", "tied head", "gpt2"],
)
def test_modules_trained_whole_take_the_places_of_theirs(
    tmp_path: Path, config: dict[str, Any], saved: list[str], size: str
) -> None:
    """
    The model and the tensors of peft's merge_and_unload: where one of two tied matrices was trained, the head gets a
    weight of its own, and the config says so.
    """
    base = _base(tmp_path / "base", config, size=size)
    folder = _adapter(base, tmp_path / "adapter", modules_to_save=saved)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(plain, folder)
    expected = _logits(adapted)
    adapted.merge_and_unload().save_pretrained(tmp_path / "by-peft")

    merged = merge(folder, tmp_path / "merged")

    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(_logits(loaded), expected, rtol=1e-4, atol=1e-4)
    was_tied = config is not LLAMA
    assert (merged.num_replaced, merged.is_untied) == (len(saved), was_tied)
    assert loaded.config.tie_word_embeddings is False
    assert ("weight of its own" in explain(merged)[1]) == was_tied
    ours, theirs = (
        {
            name: tensor
            for file in (tmp_path / by).glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        for by in ("merged", "by-peft")
    )
    assert ours.keys() == theirs.keys()
    index = tmp_path / "merged" / "model.safetensors.index.json"
    if index.is_file():
        fields = json.loads(index.read_text())
        assert fields["weight_map"].keys() == ours.keys()
        assert fields["metadata"]["total_size"] == sum(tensor.nbytes for tensor in ours.values())


def test_modules_of_another_size_are_refused(tmp_path: Path) -> None:
    """Copies of more rows make the embeddings grow; fewer, or wider ones, are of another model."""
    folder = _adapter(_base(tmp_path / "base"), tmp_path / "adapter", modules_to_save=["embed_tokens"])
    for name, config in (("longer", {"vocab_size": 264}), ("wide", {"hidden_size": 48})):
        other = _base(tmp_path / name, LLAMA | config)
        with pytest.raises(MemplanError, match="adapter") as caught:
            merge(folder, tmp_path / "merged", base=str(other))
        assert caught.value.hint
    shorter = _base(tmp_path / "shorter", LLAMA | {"vocab_size": 250})
    merge(folder, tmp_path / "merged", base=str(shorter))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    trained = load_file(folder / "adapter_model.safetensors")["base_model.model.model.embed_tokens.weight"]
    assert torch.equal(loaded.get_input_embeddings().weight, trained)
    assert loaded.get_output_embeddings().weight.shape[0] == loaded.config.vocab_size == 260


def test_sums_are_rounded_once(tmp_path: Path) -> None:
    """A bfloat16 base stays bfloat16, each weight the float32 sum rounded to it."""
    base = _base(tmp_path / "base", dtype=torch.bfloat16)
    folder = _adapter(base, tmp_path / "adapter", target_modules=["q_proj"])
    matrices = load_file(folder / "adapter_model.safetensors")

    merge(folder, tmp_path / "merged", base=str(base))

    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "merged", base))
    layer = "model.layers.1.self_attn.q_proj"
    a, b = (matrices[f"base_model.model.{layer}.lora_{part}.weight"] for part in "AB")
    expected = (theirs[f"{layer}.weight"].float() + b @ a * (6 / 4)).to(torch.bfloat16)
    assert torch.equal(ours[f"{layer}.weight"], expected)


def _run(tmp_path: Path, method: str, **changes: Any) -> Path:
    """A run's folder, as one that trained on `tmp_path`/base leaves it."""
    base = _base(tmp_path / "base")
    job = tiny_job(tmp_path, method, model=str(base), weights="pretrained").replace(**changes)
    folder = Path(job.train.output_dir)
    folder.mkdir()
    write_job(folder / JOB_FILE, job)
    return folder


def test_a_qlora_run_goes_into_the_full_precision_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command: base from the run's job, the model of peft on it, and a word about the 4 bits."""
    run = _run(tmp_path, "qlora")
    _adapter(tmp_path / "base", run / "final")
    output = tmp_path / "merged"
    output.mkdir()

    assert main(["merge", str(run), "--output", str(output)]) == 0

    told = capsys.readouterr()
    assert "merged 21 layers into" in told.out
    assert "a quantised base" in told.out
    assert "merging file 1 of 1" in told.err
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    expected = _logits(peft.PeftModel.from_pretrained(plain, run / "final"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    torch.testing.assert_close(_logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert main(["merge", str(run), "--output", str(output)]) == 2
    assert "not empty" in capsys.readouterr().err


@pytest.mark.parametrize("config", [GPT2, FALCON], ids=["gpt2", "falcon"])
def test_what_qlora_trained_is_merged_for_layers_of_other_kinds(
    tmp_path: Path, config: dict[str, Any]
) -> None:
    """
    The merged model is the base with the trained adapters beside it, and once its base is rounded to 4 bits as it was
    in training, it gives the logits that the run ended with.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from memplan.train.build import build_model
    from memplan.train.quantize import PackedLinear
    from memplan.train.worker import run_job

    base = _base(tmp_path / "base", config)
    for file in tokenizer_folder(tmp_path).glob("token*"):
        shutil.copy(file, base)
    job = tiny_job(tmp_path, "qlora", model=str(base), weights="pretrained", train__learning_rate=5e-2)
    folder = prepared(job)
    assert run_job(folder) == 0
    merge(folder, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = _logits(plain)
    adapted = peft.PeftModel.from_pretrained(plain, folder / "final")
    expected = _logits(adapted)
    assert not torch.allclose(expected, before, atol=0.1)
    torch.testing.assert_close(_logits(merged), expected, rtol=1e-4, atol=1e-4)

    built = build_model(job, config, torch.device("cpu"), weights_path=str(base))
    peft.set_peft_model_state_dict(built.model, load_file(folder / "final" / "adapter_model.safetensors"))
    own, of_merged = dict(plain.named_modules()), dict(merged.named_modules())
    for name, layer in built.model.named_modules():
        if isinstance(layer, PackedLinear):
            path = name.removeprefix("base_model.model.").removesuffix(".base_layer")
            rounded = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.quant_state)
            error = (rounded.T if layer.is_transposed else rounded) - own[f"{path}.base_layer"].weight
            of_merged[path].weight.data += error
    torch.testing.assert_close(_logits(merged), _logits(built.model), rtol=1e-3, atol=1e-3)


def test_checkpoints_of_a_run_can_be_merged(tmp_path: Path) -> None:
    """A run without final weights is refused with what to name instead; its checkpoint is taken."""
    run = _run(tmp_path, "lora")
    with pytest.raises(RunError, match="not finished") as caught:
        merge(run, tmp_path / "merged")
    assert "checkpoints/step-" in str(caught.value.hint)
    _adapter(tmp_path / "base", run / "checkpoints" / "step-2")

    merged = merge(run / "checkpoints" / "step-2", tmp_path / "merged")

    assert not merged.was_quantized
    assert len(explain(merged)) == 1


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("npt", {}, "depends on the token"),
        ("full", {}, "nothing to merge"),
        ("lora", {"weights": "random"}, "nowhere on disk"),
    ],
)
def test_runs_without_a_merge_are_refused(
    tmp_path: Path, method: str, changes: dict[str, Any], words: str
) -> None:
    """NPT, whole models, and bases that no file holds."""
    run = _run(tmp_path, method, **changes)
    _adapter(tmp_path / "base", run / "final")

    with pytest.raises(RunError, match=words) as caught:
        merge(run, tmp_path / "merged")
    assert caught.value.hint
    assert not (tmp_path / "merged").exists()


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rename(folder: Path, old: str, new: str) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name.replace(old, new): tensor for name, tensor in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: _edit(folder, use_dora=True), "`use_dora`"),
        (lambda folder: _edit(folder, bias="all"), "`bias`"),
        (lambda folder: _edit(folder, modules_to_save=["lm_head"]), "lacks `lm_head.weight`"),
        (lambda folder: _edit(folder, ensure_weight_tying=True), "`ensure_weight_tying`"),
        (lambda folder: _edit(folder, peft_type="IA3"), "type `IA3`"),
        (lambda folder: _edit(folder, init_lora_weights="pissa"), "pissa"),
        (lambda folder: _edit(folder, base_model_name_or_path=None), "what its base is"),
        (lambda folder: _rename(folder, "lora_A", "lora_magnitude"), "no matrix beside"),
        (lambda folder: _rename(folder, "layers.2", "layers.7"), "none of that name"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"short"), "cannot be read"),
    ],
)
def test_other_adapters_are_refused(tmp_path: Path, spoil: Callable[[Path], None], words: str) -> None:
    """Whatever is more than two matrices beside a linear layer, or beside a layer that is not there."""
    folder = _adapter(_base(tmp_path / "base"), tmp_path / "adapter")
    spoil(folder)

    with pytest.raises(MemplanError, match=words) as caught:
        merge(folder, tmp_path / "merged")
    assert caught.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_other_bases_are_refused(tmp_path: Path) -> None:
    """Quantised, of another width, without weights, or with a head that is the embeddings as well."""
    base = _base(tmp_path / "base")
    folder = _adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    wide = _base(tmp_path / "wide", LLAMA | {"hidden_size": 48})
    tied = _base(tmp_path / "tied", TIED)
    packed = _base(tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": {"load_in_4bit": True}}))
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.json").write_text(json.dumps(LLAMA))

    for other, words in ((wide, "for a weight of"), (tied, "shares its weight"), (packed, "quantised"),
                         (empty, "no safetensors")):  # fmt: skip
        with pytest.raises(MemplanError, match=words):
            merge(folder, tmp_path / "merged", base=str(other))
        assert not (tmp_path / "merged").exists()
        assert not list(tmp_path.glob(".unfinished*"))


@pytest.mark.skipif(not CAN_TELL, reason="the resident set as Linux counts it")
def test_merging_takes_the_ram_of_a_layer(tmp_path: Path) -> None:
    """A base of 64 MiB in one file, of which 63 MiB are embeddings without adapters."""
    config = LLAMA | {
        "vocab_size": 130_000,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
    }
    base = _base(tmp_path / "base", config, dtype=torch.bfloat16)
    folder = _adapter(base, tmp_path / "adapter")
    merge(folder, tmp_path / "first")

    grown, _ = peak_growth(lambda: merge(folder, tmp_path / "second"))

    assert (base / "model.safetensors").stat().st_size > 60 << 20
    assert grown < 16 << 20
