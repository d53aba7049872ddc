"""Activation offload: what moves, that it changes no gradient, and that it is what the planner counts."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_runs import GPT2, LLAMA  # noqa: E402

from memplan.budget.host import host_memory  # noqa: E402
from memplan.job.spec import Job, Lora, Quantization  # noqa: E402
from memplan.model.config import architecture_from_config  # noqa: E402
from memplan.train.build import Built, build_model  # noqa: E402
from memplan.train.offload import offload_inputs  # noqa: E402

pytestmark = pytest.mark.torch

IDS = torch.arange(24).view(2, 12)


class RecordingMover:
    """Copies, and remembers how many bytes of the copies are alive: those of the host, were it another memory."""

    def __init__(self) -> None:
        self.moved: list[torch.Size] = []
        self.live_bytes = self.peak_bytes = self.returned = 0

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        self.moved.append(tensor.shape)
        self.live_bytes += tensor.nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return tensor.detach().clone()

    def to_device(self, host: torch.Tensor) -> torch.Tensor:
        self.returned += 1
        self.live_bytes -= host.nbytes
        return host.clone()


def _job(**changes: Any) -> Job:
    job = Job(model="tiny", weights="random", dtype="float32", lora=Lora(rank=4, dropout=0.2))
    return job.replace(activation_checkpointing="full", micro_batch_size=2, max_seq_len=12).replace(**changes)


def _build(job: Job, config: dict[str, Any]) -> Built:
    built = build_model(job, config, torch.device("cpu"), weights_path=None)
    for parameter in built.trainable:  # adapters start with B = 0, which hides half of the gradients
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    return built


def _gradients(built: Built) -> list[torch.Tensor]:
    torch.manual_seed(5)
    built.model(input_ids=IDS, labels=IDS).loss.backward()
    return [parameter.grad for parameter in built.trainable if parameter.grad is not None]


@pytest.mark.parametrize(
    ("config", "changes"),
    [
        (LLAMA, {"method": "lora"}),
        (LLAMA, {"method": "qlora", "dtype": "bfloat16"}),
        (
            LLAMA,
            {"method": "qlora", "dtype": "bfloat16", "quantization": Quantization(kbit_preparation=True)},
        ),
        (GPT2, {"method": "full", "activation_checkpointing": "selective"}),
    ],
    ids=["lora", "qlora", "prepared", "selective"],
)
def test_inputs_move_and_gradients_stay(config: dict[str, Any], changes: dict[str, Any]) -> None:
    """One tensor per recomputed block, which the plan has on the host in pinned blocks, all back after backward."""
    job = _job(**changes)
    expected = _gradients(_build(job, config))
    built, mover = _build(job, config), RecordingMover()
    offload_inputs(built.model, mover)

    actual = _gradients(built)

    assert len(actual) == len(expected) > 0
    assert all(torch.equal(one, other) for one, other in zip(actual, expected))
    width = config.get("hidden_size") or config["n_embd"]
    assert mover.moved == [torch.Size((2, 12, width))] * (1 if "activation_checkpointing" in changes else 3)
    architecture = architecture_from_config(config, name="tiny", source="test")
    host = host_memory(job.replace(activation_offload=True), architecture)
    moved_bytes = mover.peak_bytes // len(mover.moved)
    pinned_bytes = 1 << (moved_bytes - 1).bit_length()  # torch pins powers of two
    assert pinned_bytes >= moved_bytes > pinned_bytes // 2
    assert {line.category: line.bytes for line in host.budget}["activations"] == pinned_bytes * len(
        mover.moved
    )
    assert (mover.live_bytes, mover.returned) == (0, len(mover.moved))


def test_the_job_switches_it_on() -> None:
    """`activation_offload` gives the gradients of a job without it; evaluation moves nothing."""
    expected = _gradients(_build(_job(), LLAMA))
    built = _build(_job(activation_offload=True), LLAMA)
    movers = {id(block._gradient_checkpointing_func.mover) for block in built.decoder.layers}

    assert len(movers) == 1
    assert all(torch.equal(one, other) for one, other in zip(_gradients(built), expected))
    mover = RecordingMover()
    offload_inputs(built.model, mover)
    with torch.no_grad():
        built.model.eval()(input_ids=IDS)
    assert mover.moved == []


def test_small_tensors_and_parameters_stay() -> None:
    """They are saved as they are: another copy of a weight would be a waste."""
    from torch.utils.checkpoint import checkpoint

    from memplan.train.offload import OffloadedCheckpoint

    mover = RecordingMover()
    run = OffloadedCheckpoint(lambda function, *args: checkpoint(function, *args, use_reentrant=False), mover)
    weight = torch.nn.Parameter(torch.ones(40, 40))
    x, small = torch.ones(40, 40).T.requires_grad_(), torch.ones(2, requires_grad=True)

    run(lambda weight, x, small: (weight @ x).sin() * small.sum(), weight, x, small).sum().backward()

    assert mover.moved == [x.shape]
    assert weight.grad is not None and small.grad is not None and x.grad is not None
