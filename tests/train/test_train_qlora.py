"""QLoRA: which layers are packed and how, what stays as it is, and whole runs against their plan."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
bitsandbytes = pytest.importorskip("bitsandbytes")

from tiny_runs import FALCON, GPT2, LLAMA, losses, prepared, stops_in, tiny_job  # noqa: E402

from memplan.errors import RunError  # noqa: E402
from memplan.job.load import load_job  # noqa: E402
from memplan.job.spec import Job, Lora, Quantization  # noqa: E402
from memplan.train import quantize  # noqa: E402
from memplan.train.build import Built, build_model  # noqa: E402
from memplan.train.data import MicroBatch  # noqa: E402
from memplan.train.group import Group  # noqa: E402
from memplan.train.optimizer import build_optimizer  # noqa: E402
from memplan.train.parallel import Parallel, build_parallel  # noqa: E402
from memplan.train.quantize import PackedLinear, storage_dtype  # noqa: E402
from memplan.train.record import Record  # noqa: E402
from memplan.train.refusals import refuse_untrainable  # noqa: E402
from memplan.train.worker import run_job  # noqa: E402

pytestmark = pytest.mark.torch

IDS = torch.tensor([[1, 2, 3, 4, 5, 6]])


def _build(config: dict[str, Any] = LLAMA, method: str = "qlora", **changes: Any) -> Built:
    job = Job(model="tiny", weights="random", method=method, dtype="float32", lora=Lora(rank=4))
    return build_model(job.replace(**changes), config, torch.device("cpu"), weights_path=None)


def _packed(built: Built) -> dict[str, PackedLinear]:
    """Packed layers by their names without adapters."""
    return {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module
        for name, module in built.model.named_modules()
        if isinstance(module, PackedLinear)
    }


def _dtypes(built: Built) -> dict[bool, set[torch.dtype]]:
    """Of the frozen parameters: of packed ones, and of the others."""
    found: dict[bool, set[torch.dtype]] = {True: set(), False: set()}
    for parameter in built.model.parameters():
        if not parameter.requires_grad:
            found[isinstance(parameter, bitsandbytes.nn.Params4bit)].add(parameter.dtype)
    return found


@pytest.mark.parametrize("quantization_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_layers_hold_what_bitsandbytes_makes_of_the_weights(
    quantization_type: str, double_quant: bool
) -> None:
    """The random base is that of LoRA, packed; its layers compute what the unpacked weights do."""
    plain = dict(_build(method="full").model.named_modules())
    built = _build(quantization=Quantization(type=quantization_type, double_quant=double_quant))
    layers = _packed(built)

    assert len(layers) == 7 * LLAMA["num_hidden_layers"]
    storage = storage_dtype(Job(model="tiny", dtype="float32"))
    for name, layer in layers.items():
        weight = plain[name].weight.detach()
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, compress_statistics=double_quant, quant_type=quantization_type, quant_storage=storage
        )
        # As bytes: in another dtype some of them are no number, which equals nothing.
        assert torch.equal(layer.weight.data.view(torch.uint8), packed.view(torch.uint8)), name
        whole = bitsandbytes.functional.dequantize_4bit(packed, state)
        x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
        assert torch.equal(layer(x), x @ whole.T), name
        assert layer.quant_state.nested == double_quant
        assert layer.weight.dtype == storage


@pytest.mark.parametrize(
    ("config", "loads"),
    [(GPT2, False), (GPT2, True), (FALCON, True)],
    ids=["gpt2, drawn", "gpt2, loaded", "falcon, loaded"],
)
def test_layers_of_other_kinds_are_packed(tmp_path: Path, config: dict[str, Any], loads: bool) -> None:
    """
    Conv1D, whose weight is transposed first as transformers does it, and Falcon's linear layer: the model is the plain
    one with weights that were rounded to 4 bits.
    """
    whole = _build(config, method="full").model
    path = None
    if loads:
        whole.save_pretrained(tmp_path)
        path = str(tmp_path)
    job = Job(model="tiny", weights="random", method="qlora", dtype="float32", lora=Lora(rank=4))
    built = build_model(job, config, torch.device("cpu"), weights_path=path)
    plain, layers = dict(whole.named_modules()), _packed(built)

    assert len(layers) == 4 * 3
    for name, layer in layers.items():
        transposed = config is GPT2
        weight = plain[name].weight.detach()
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight.T.contiguous() if transposed else weight, compress_statistics=True, quant_type="nf4"
        )
        assert torch.equal(layer.weight.data.view(torch.uint8), packed.view(torch.uint8)), name
        rounded = bitsandbytes.functional.dequantize_4bit(packed, state)
        assert not torch.equal(rounded.T if transposed else rounded, weight)
        plain[name].weight.data = rounded.T.contiguous() if transposed else rounded
    with torch.no_grad():
        ours, theirs = (model.eval()(input_ids=IDS).logits for model in (built.model, whole))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_what_is_not_packed() -> None:
    """The head and what `skip` names stay as they are, a head tied to the embeddings always, and norms."""
    assert type(_build().head) is torch.nn.Linear
    assert isinstance(_build(**{"quantization.skip": ()}).head, PackedLinear)
    tied = _build(LLAMA | {"tie_word_embeddings": True}, **{"quantization.skip": ()})
    assert type(tied.head) is torch.nn.Linear
    assert tied.head.weight is tied.decoder.embed_tokens.weight
    some = _packed(_build(**{"quantization.skip": ("lm_head", "mlp.down_proj", "k_proj")}))
    assert {name.split(".")[-1] for name in some} == {"q_proj", "v_proj", "o_proj", "gate_proj", "up_proj"}
    built = _build(dtype="bfloat16")
    assert _dtypes(built) == {True: {storage_dtype(Job(model="tiny"))}, False: {torch.bfloat16}}
    built = _build(dtype="bfloat16", **{"quantization.kbit_preparation": True})
    assert _dtypes(built) == {True: {storage_dtype(Job(model="tiny"))}, False: {torch.float32}}


def test_evaluation_leaves_the_packed_weights_alone() -> None:
    """Also on CPUs for which bitsandbytes has an inference layout of its own: train, eval, train give the same."""
    built = _build()
    assert not any(layer.support_avx512bf16_for_cpu for layer in _packed(built).values())
    with torch.no_grad():
        first = built.model.train()(input_ids=IDS).logits
        built.model.eval()(input_ids=IDS)
        again = built.model.train()(input_ids=IDS).logits

    assert torch.equal(first, again)


def test_what_cannot_be_packed_is_refused() -> None:
    """All layers skipped, and the chunked loss, which needs the head's weight."""
    with pytest.raises(RunError, match="4 bits") as caught:
        _build(GPT2, **{"quantization.skip": ("c_attn", "c_fc", "c_proj")})
    assert caught.value.hint
    with pytest.raises(RunError, match="output head"):
        _build(loss="chunked", **{"quantization.skip": ()})


@pytest.mark.parametrize(
    "config",
    [
        LLAMA | {"hidden_size": 64, "intermediate_size": 192, "vocab_size": 600},
        GPT2 | {"n_embd": 64, "vocab_size": 600},
        FALCON | {"hidden_size": 64, "vocab_size": 600},
    ],
    ids=["llama", "gpt2", "falcon"],
)
def test_a_run_learns_and_keeps_to_its_plan(tmp_path: Path, config: dict[str, Any]) -> None:
    """The loss falls; the plan is within 1 % of what was measured, in every phase of every step."""
    # So short that every micro batch has a sample of full length.
    changes = {"dtype": "bfloat16", "max_seq_len": 24}
    job = tiny_job(
        tmp_path, "qlora", config=config, train__max_steps=15, train__learning_rate=2e-2, **changes
    )
    folder = prepared(job)

    assert run_job(folder) == 0

    curve = losses(folder)
    assert curve[15] < 0.8 * curve[1]
    record = Record.read(folder)
    assert record is not None
    assert "bitsandbytes" in record.fields["versions"]
    measured = {}
    for peak in record.fields["measured"]["phases"]:
        measured[peak["phase"]] = max(measured.get(peak["phase"], 0), peak["allocated_peak_bytes"])
    planned: dict[str, int] = {}
    for line in record.fields["plan"]["phases"]:
        planned[line["phase"]] = max(planned.get(line["phase"], 0), line["allocated_peak_bytes"])
    assert set(measured) == {"load", "forward", "backward", "optimizer_step"}
    for phase, peak_bytes in measured.items():
        assert peak_bytes == pytest.approx(planned[phase], rel=0.01), phase


@pytest.mark.parametrize("config", [LLAMA, GPT2, FALCON], ids=["llama", "gpt2", "falcon"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, config: dict[str, Any]) -> None:
    """Bit for bit, with dropout and checkpointing; the adapters load into a 4-bit model of transformers."""
    changes = {"lora__dropout": 0.2, "activation_checkpointing": "full"}
    job = tiny_job(tmp_path, "qlora", config=config, train__max_steps=4, train__save_every=2, **changes)
    whole = prepared(job)
    assert run_job(whole) == 0
    resumed = prepared(job.replace(**{"train.output_dir": str(tmp_path / "resumed")}))

    assert run_job(resumed, hook=stops_in("backward", 4)) == 70
    assert run_job(resumed, resume=True) == 0
    assert losses(whole) == losses(resumed)
    adapter = json.loads((whole / "final" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == job.model


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Group]:
    """A process group of this process alone: FSDP gathers and casts in it as in a larger one."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield Group()
    torch.distributed.destroy_process_group()


def _sharded(group: Group, **changes: Any) -> Parallel:
    job = Job(model="tiny", weights="random", method="qlora", dtype="bfloat16", lora=Lora(rank=4))
    job = job.replace(**{"parallel.strategy": "FULL_SHARD", **changes})
    return build_parallel(job, LLAMA, group, weights_path=None)


def test_sharded_layers_compute_what_whole_ones_do(group: Group) -> None:
    """After sharding, one layer of every shape has been compared; none is left holding its output."""
    layers = list(_packed(_sharded(group, **{"quantization.skip": ()}).built).values())

    probed = {(layer.in_features, layer.out_features) for layer in layers if layer.is_probed}
    assert probed == {(32, 32), (32, 16), (32, 80), (80, 32), (32, 260)}
    assert len([layer for layer in layers if layer.is_probed]) == len(probed)
    assert all(layer.expected is None for layer in layers)


def test_packed_weights_that_are_cast_on_the_way_are_refused(
    group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stored as float16 and gathered as bfloat16, packed weights would be destroyed without a word."""
    monkeypatch.setattr(quantize, "storage_dtype", lambda job: torch.float16)

    with pytest.raises(RunError, match="computes something else") as caught:
        _sharded(group)
    assert caught.value.hint


@pytest.mark.parametrize("name", ["qlora-ddp-8k", "qlora-fsdp-8k"])
def test_ready_jobs_train_a_small_model_of_the_same_kind(tmp_path: Path, group: Group, name: str) -> None:
    """The job as it is is one that this trainer runs; on one process and a small Llama it steps."""
    job = load_job(name).job
    refuse_untrainable(job)
    small = tiny_job(tmp_path, "qlora").replace(
        **{
            "dtype": job.dtype, "lora": job.lora, "quantization": job.quantization, "load": job.load,
            "activation_checkpointing": job.activation_checkpointing, "max_seq_len": 24,
            "parallel.strategy": job.parallel.strategy, "gradient_accumulation_steps": 1,
        }
    )  # fmt: skip
    parallel = build_parallel(small, LLAMA, group, weights_path=None)
    optimizer = build_optimizer(small, list(parallel.trainable.values()))
    ids = torch.arange(48).view(2, 24) * 5

    curve = []
    for _ in range(6):
        loss = parallel(MicroBatch(ids, ids), 46)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())

    assert parallel.is_sharded == (name == "qlora-fsdp-8k")
    assert curve[-1] < 0.95 * curve[0]
