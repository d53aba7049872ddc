"""NPT files: what comes back is what was saved, and a file that does not fit says why."""

from __future__ import annotations

import json

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
safetensors_torch = pytest.importorskip("safetensors.torch")

from npt_models import VARIANTS, excite, tiny, token_ids  # noqa: E402

from memplan.errors import ModelError, RunError  # noqa: E402
from memplan.job.spec import Npt  # noqa: E402
from memplan.npt import convert, load_npt, save_npt, saved_npt  # noqa: E402

pytestmark = pytest.mark.torch

NPT = Npt(layers=(1, 3), rank=5, modulation_scale=0.3)


@pytest.fixture
def saved(tmp_path):
    """A file of the blocks 1 and 3 of a tiny Llama, and the logits of the model it comes from."""
    model = tiny()
    excite(convert(model, NPT))
    path = tmp_path / "folder" / "npt.safetensors"
    save_npt(model, path)
    with torch.no_grad():
        return path, model(token_ids()).logits


def test_a_fresh_model_becomes_the_saved_one(saved):
    """`saved_npt` says how to convert the base; `load_npt` restores the logits of before, bit for bit."""
    path, expected = saved
    model = tiny()
    npt = saved_npt(path)
    assert NPT == npt
    blocks = convert(model, npt, seed=9)
    load_npt(model, path)
    with torch.no_grad():
        assert torch.equal(expected, model(token_ids()).logits)
    assert all(parameter.requires_grad for block in blocks for parameter in block.np.parameters())


def test_the_file_holds_npt_tensors_and_their_origin_alone(saved):
    """Four tensors of the right shapes and the metadata to check them; nothing of the base."""
    path, _ = saved
    tensors = safetensors_torch.load_file(path)
    assert {
        "layers.1.A": (32, 5),
        "layers.1.B": (5, 48),
        "layers.3.A": (32, 5),
        "layers.3.B": (5, 48),
    } == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert "memplan-npt-1" == metadata.pop("format")
    assert {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "variant": "diag",
        "target": "gate",
        "bias": False,
        "rank": 5,
        "modulation_scale": 0.3,
        "layers": [1, 3],
    } == {key: json.loads(value) for key, value in metadata.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_comes_back(tmp_path, variant):
    """The file alone says how to convert a fresh model, whose logits are then those of the saved one."""
    npt = Npt(layers=(1, 3), rank=5, **VARIANTS[variant])
    model, fresh = tiny(), tiny()
    excite(convert(model, npt), std=0.3)
    save_npt(model, tmp_path / "npt.safetensors")
    assert npt == saved_npt(tmp_path / "npt.safetensors")
    convert(fresh, saved_npt(tmp_path / "npt.safetensors"))
    load_npt(fresh, tmp_path / "npt.safetensors")
    with torch.no_grad():
        assert torch.equal(model(token_ids()).logits, fresh(token_ids()).logits)


def test_values_are_cast_to_the_model_s_dtype(saved):
    """A float32 file fits a model whose NPT parameters are bfloat16."""
    path, _ = saved
    model = tiny().bfloat16()
    block = convert(model, NPT, dtype=torch.bfloat16)[0]
    load_npt(model, path)
    assert torch.equal(safetensors_torch.load_file(path)["layers.1.A"].bfloat16(), block.np.A)


@pytest.mark.parametrize(
    ("family", "config", "npt", "error", "said"),
    [
        ("llama", {}, {"rank": 4}, RunError, ["rank is 5 in the file, 4 in the model"]),
        ("llama", {}, {"layers": (1, 2)}, RunError, ["layers is [1, 3] in the file, [1, 2] in the model"]),
        ("llama", {}, {"modulation_scale": 0.1, "rank": 2}, RunError, ["rank is", "modulation_scale is 0.3"]),
        ("qwen2", {}, {}, ModelError, ["model_type is llama in the file, qwen2 in the model"]),
        ("llama", {"intermediate_size": 64}, {}, ModelError, ["intermediate_size is 48 in the file, 64"]),
        (
            "llama",
            {"hidden_size": 64},
            {"rank": 3},
            ModelError,
            ["hidden_size is 32 in the file, 64", "rank is"],
        ),
    ],
)
def test_a_mismatch_is_named_and_changes_nothing(saved, family, config, npt, error, said):
    """Every difference between file and model is in the message; the model keeps its values."""
    path, _ = saved
    model = tiny(family, **config)
    settings = {"layers": (1, 3), "rank": 5, "modulation_scale": 0.3} | npt
    block = convert(model, Npt(**settings))[0]
    before = block.np.A.detach().clone()
    with pytest.raises(error) as caught:
        load_npt(model, path)
    assert all(part in caught.value.message for part in said)
    assert caught.value.hint
    assert torch.equal(before, block.np.A)


def test_files_that_cannot_be_read_are_run_errors(saved, tmp_path):
    """Missing, truncated, foreign and incomplete files, and a model without NPT blocks."""
    path, _ = saved
    model = tiny()
    with pytest.raises(RunError, match="has no NPT blocks"):
        load_npt(model, path)
    with pytest.raises(RunError, match="has no NPT blocks"):
        save_npt(model, tmp_path / "none")
    convert(model, NPT)
    with pytest.raises(RunError, match="cannot be read"):
        load_npt(model, tmp_path / "missing.safetensors")
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RunError, match="cannot be read"):
        load_npt(model, truncated)
    foreign = tmp_path / "foreign.safetensors"
    safetensors_torch.save_file({"layers.1.A": torch.zeros(32, 5)}, foreign)
    with pytest.raises(RunError, match="not a file of NPT layers"):
        saved_npt(foreign)
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    incomplete = tmp_path / "incomplete.safetensors"
    tensors = safetensors_torch.load_file(path)
    safetensors_torch.save_file({**tensors, "layers.3.B": torch.zeros(5, 47)}, incomplete, metadata)
    with pytest.raises(RunError, match=r"shape \(5, 47\) for layers\.3\.B"):
        load_npt(model, incomplete)
    del tensors["layers.3.B"]
    safetensors_torch.save_file(tensors, incomplete, metadata)
    with pytest.raises(RunError, match=r"nothing for layers\.3\.B"):
        load_npt(model, incomplete)


def test_a_file_that_cannot_be_written_is_a_run_error(tmp_path):
    """A folder in the way of the file, or a file in the way of the folder."""
    model = tiny()
    convert(model, NPT)
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "npt.safetensors"):
        with pytest.raises(RunError, match="cannot be written"):
            save_npt(model, path)
