"""torchao's optimizers: what their states are made of, and the buffers of their compiled step."""

from __future__ import annotations

from math import prod

import pytest

from memplan.errors import JobError
from memplan.job.load import load_job
from memplan.job.spec import Job
from memplan.model import resolve_model
from memplan.tape.low_bit import LOW_BIT, Buffer, is_quantized, state_buffers, step_buffers
from memplan.tape.multiprocessors import Multiprocessors
from memplan.tape.tensors import ITEMSIZE
from memplan.tape.writer import write_tape

H100 = Multiprocessors(132, 2048)
SHAPES = [
    (4096,),
    (16, 256),
    (8, 1024, 256),
    (4096, 4096),
    (256, 300),
    (14336, 64),
    (8, 128, 64),
    (4095,),
    (4097,),
]


def num_bytes(buffer: Buffer) -> int:
    return prod(buffer.shape) * ITEMSIZE[buffer.dtype]


def most(optimizer: str, shape: tuple[int, ...]) -> int:
    """Bytes that a step of one parameter has at once."""
    held: dict[str, int] = {}
    peak = 0
    for item in step_buffers(optimizer, shape, H100):
        if isinstance(item, Buffer):
            assert item.name not in held
            held[item.name] = num_bytes(item)
        else:
            del held[item]
        peak = max(peak, sum(held.values()))
    assert not held
    return peak


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("optimizer", LOW_BIT)
def test_a_step_lets_go_of_what_it_makes(optimizer: str, shape: tuple[int, ...]) -> None:
    count, scales = prod(shape), 2 * prod(shape) // 256 * 4
    expected = {
        "ao_adamw_8bit": 0 if len(shape) == 1 or shape[-1] == 256 else 8 * count + scales,
        "ao_adamw_4bit": 24 * count + scales,
        "ao_adamw_fp8": 0 if shape == (16, 256) else scales + (2 * count if shape[-1] == 64 else 0),
    }
    assert most(optimizer, shape) == (expected[optimizer] if is_quantized(shape) else 0)


@pytest.mark.parametrize(
    ("optimizer", "per_number", "of_maps"),
    [("ao_adamw_8bit", 2, 2048), ("ao_adamw_4bit", 1, 128), ("ao_adamw_fp8", 2, 0)],
)
def test_states_in_blocks_of_256(optimizer: str, per_number: int, of_maps: int) -> None:
    """Codes, a float32 scale per block, and a map of its own for each state; small tensors keep their dtype."""
    made = list(state_buffers(optimizer, (64, 128), "bfloat16"))
    assert sum(map(num_bytes, made)) == 64 * 128 * per_number + 2 * 32 * 4 + of_maps
    assert [(16, 16)] * 2 == [buffer.shape for buffer in state_buffers(optimizer, (16, 16), "bfloat16")]
    odd = list(state_buffers(optimizer, (4097,), "bfloat16"))
    assert sum(map(num_bytes, odd)) == 2 * 4097 * 2


@pytest.mark.parametrize("optimizer", LOW_BIT)
def test_states_are_those_of_torchao(optimizer: str) -> None:
    """Where torchao is installed: its own tensors."""
    adam = pytest.importorskip("torchao.optim.adam")
    import torch

    classes = {
        "ao_adamw_8bit": adam.AdamW8bit,
        "ao_adamw_4bit": adam.AdamW4bit,
        "ao_adamw_fp8": adam.AdamWFp8,
    }
    for shape in SHAPES:
        parameter = torch.nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        made = classes[optimizer]([parameter], block_size=256)
        found = []
        for signed in (True, False):
            state = made._new_buffer(parameter, signed)
            names = getattr(state, "tensor_attrs", None)
            found += [getattr(state, name) for name in names] if names else [state]
        expected = [(tuple(item.shape), str(item.dtype)) for item in found]
        planned = [
            (item.shape, f"torch.{item.dtype}") for item in state_buffers(optimizer, shape, "bfloat16")
        ]
        assert expected == planned


def test_the_largest_parameter_decides_the_step() -> None:
    """Full training of GPT-2 in 4 bits: the step of its embeddings holds 24 bytes for each of their numbers."""
    job = Job(model="gpt2", method="full", loop="hf_trainer", optimizer="ao_adamw_4bit", max_seq_len=8)
    tape = write_tape(job, resolve_model("gpt2")).flatten()
    embeddings = 50257 * 768
    largest = sorted(tape.sizes, reverse=True)[:4]
    assert largest.count(8 * embeddings) == 4  # two of each step
    assert tape.sizes.count(embeddings // 256 * 4) >= 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["loop=memplan"], "which memplan's own loop does not run"),
        (
            ["loop=hf_trainer", "parallel.strategy=ZERO_2", "parallel.dp_shard=2"],
            "is not planned with `parallel.strategy: ZERO_2`",
        ),
        (
            ["loop=hf_trainer", "parallel.strategy=FULL_SHARD", "parallel.dp_shard=2", "offload.params=true"],
            "is not planned with `offload.params: true`",
        ),
    ],
)
def test_where_it_is_not_planned(more: list[str], words: str) -> None:
    with pytest.raises(JobError) as refused:
        load_job(None, ["model=gpt2", "optimizer=ao_adamw_fp8", *more])
    assert words in str(refused.value)
    assert refused.value.hint or "; " in str(refused.value)
