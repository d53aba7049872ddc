"""The optimizer's step on copies in host memory: the same weights, nothing of it left on the device, resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_runs import losses, prepared, tiny_job  # noqa: E402

from memplan.budget.host import host_memory  # noqa: E402
from memplan.job.spec import Job  # noqa: E402
from memplan.model import resolve_model  # noqa: E402
from memplan.train import run  # noqa: E402
from memplan.train.host_optimizer import HostCopies, host_copies  # noqa: E402
from memplan.train.run import Run  # noqa: E402

pytestmark = pytest.mark.torch


class Host:
    """Memory apart from that of the weights, which counts what it gave."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.made: list[HostCopies] = []

    def copies(self, job: Job, trainable: Any, device: torch.device) -> HostCopies | None:
        if not job.offload.optimizer:
            return None
        self.made.append(HostCopies(trainable, self._allocate))
        return self.made[-1]

    def _allocate(self, num_elements: int, dtype: torch.dtype) -> torch.Tensor:
        self.num_bytes += 1 << (num_elements * dtype.itemsize - 1).bit_length()  # torch pins powers of two
        return torch.empty(num_elements, dtype=dtype)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    """What the CPU's memory would be to a GPU."""
    host = Host()
    monkeypatch.setattr(run, "host_copies", host.copies)
    return host


def _train(job: Job, **settings: Any) -> Run:
    made = Run(prepared(job), job, **settings)
    made.execute()
    made.stop_measuring()
    return made


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("lora", {"train__max_grad_norm": 0.1, "lora__dropout": 0.1}),
        ("full", {"dtype": "bfloat16", "train__weight_decay": 0.1, "optimizer_kernel": "foreach"}),
        ("npt", {"optimizer": "adafactor"}),
    ],
    ids=["lora", "full", "npt"],
)
def test_a_step_on_the_host_is_the_step_on_the_device(
    tmp_path: Path, host: Host, method: str, changes: dict[str, Any]
) -> None:
    """Bit for bit, and with the bytes that the plan has for the host."""
    kept = tiny_job(tmp_path, method, **changes)
    offloaded = kept.replace(**{"offload.optimizer": True, "train.output_dir": str(tmp_path / "offloaded")})
    device_run, host_run = _train(kept), _train(offloaded)

    assert losses(host_run.folder) == losses(device_run.folder)
    (copies,) = host.made
    assert host_run._parallel is not None and host_run._loop is not None
    trainable = host_run._parallel.trainable
    assert all(torch.equal(copies.parameters[name], trainable[name]) for name in trainable)
    assert all(parameter.grad is None for parameter in trainable.values())
    stepped = {id(parameter) for parameter in copies.parameters.values()}
    assert {id(parameter) for parameter in host_run._loop.optimizer.state} == stepped
    planned = host_memory(offloaded, resolve_model(offloaded.model))
    line = next(line for line in planned.budget if line.category == "optimizer")
    states = 0 if offloaded.optimizer == "adafactor" else 2 * sum(p.nbytes for p in trainable.values())
    assert line.bytes == host.num_bytes + states


def test_a_run_goes_on_with_and_without(tmp_path: Path, host: Host) -> None:
    """A checkpoint of either continues as the other, to the same losses."""
    whole = tiny_job(tmp_path, "lora", train__save_every=2, lora__dropout=0.1)
    offloaded = whole.replace(**{"offload.optimizer": True, "train.output_dir": str(tmp_path / "offloaded")})
    expected = losses(_train(whole).folder)

    for first, second in ((True, False), (False, True), (True, True)):
        job = offloaded.replace(**{"train.output_dir": str(tmp_path / f"{first}-{second}")})
        _train(job.replace(**{"train.max_steps": 2, "offload.optimizer": first}))
        resumed = _train(job.replace(**{"offload.optimizer": second}), resume=True)
        assert losses(resumed.folder) == expected


def test_on_the_cpu_there_is_one_memory(tmp_path: Path) -> None:
    """Nothing is copied there, nor where FSDP keeps the shards on the host."""
    job = tiny_job(tmp_path, offload__optimizer=True)
    cuda = torch.device("cuda")
    assert host_copies(job, {}, torch.device("cpu")) is None
    assert host_copies(job.replace(**{"offload.params": True}), {}, cuda) is None
    assert host_copies(job.replace(**{"offload.optimizer": False}), {}, cuda) is None
    assert host_copies(job, {}, cuda) is not None
