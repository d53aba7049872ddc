"""
What the factored form of an NPT block saves. `python -m benchmarks.npt`

Time of forward and backward of one block's deltas on one thread: factored, token by token with the same factors, and
with the weight delta of every token. Then the memory that a training step takes beyond the base's weights, measured
with torch's profiler on the CPU, beside the plan.
"""

from __future__ import annotations

import io
import json
import statistics
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from memplan.job.spec import Data, Job, Npt, Train
from memplan.model.config import architecture_from_config
from memplan.model.tensors import num_parameters
from memplan.npt.modulator import Modulator, make_modulator
from memplan.train.output_folder import JOB_FILE, write_job
from memplan.train.record import Record
from memplan.train.worker import run_job
from memplan.units import format_bytes

NUM_TOKENS, HIDDEN, INTERMEDIATE, RANK = 512, 256, 1024, 16
REPEATS = 5
MEMORY_TOKENS = 256
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 256,
    "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4,
    "max_position_embeddings": 512, "tie_word_embeddings": False,
}  # fmt: skip
GPT2 = {
    "architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": 512, "n_embd": 256, "n_head": 4,
    "n_layer": 4, "n_positions": 512,
}  # fmt: skip
VARIANTS: dict[str, Npt] = {
    "diag": Npt(rank=RANK),
    "outer, 8 components": Npt(variant="outer", rank=RANK, components=8),
    "linear": Npt(variant="linear", rank=RANK),
    "diag, gate and up, bias": Npt(target="gate_up", bias=True, rank=RANK),
    "linear, all matrices, bias": Npt(variant="linear", target="all", bias=True, rank=RANK),
}


def factored(made: Modulator, x: Tensor, a: Tensor) -> Tensor:
    """All tokens at once."""
    return made.low_rank(x, made.encode(a)) @ made.B


def token_by_token(made: Modulator, x: Tensor, a: Tensor) -> Tensor:
    """The same factors in a loop over the sequence."""
    tokens = [factored(made, x[:, index : index + 1], a[:, index : index + 1]) for index in range(x.shape[1])]
    return torch.cat(tokens, 1)


def materialised(made: Modulator, x: Tensor, a: Tensor) -> Tensor:
    """The weight delta of every token, applied to it."""
    return (x.unsqueeze(-2) @ made.weight_delta(made.encode(a), x.dtype)).squeeze(-2)


def seconds(form: Callable[[Modulator, Tensor, Tensor], Tensor], made: Modulator, repeats: int) -> float:
    """Median time of forward and backward."""
    torch.manual_seed(0)
    x, a = torch.randn(2, 1, NUM_TOKENS, HIDDEN)
    x.requires_grad_()
    a.requires_grad_()
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        form(made, x, a).sum().backward()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def extra_bytes(npt: Npt, config: dict[str, Any]) -> tuple[int, int]:
    """Peak of the forward phase, where NPT layers train, without the base's weights: planned, measured."""
    base_bytes = 4 * num_parameters(architecture_from_config(config, name="tiny", source="benchmark"))
    with TemporaryDirectory(prefix="memplan-") as scratch:
        folder = Path(scratch)
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        job = Job(
            model=str(folder),
            weights="random",
            method="npt",
            dtype="float32",
            max_seq_len=MEMORY_TOKENS,
            packing=True,
            npt=npt,
            data=Data(train="memplan-docs"),
            train=Train(max_steps=3, output_dir=scratch),
        )
        write_job(folder / JOB_FILE, job)
        with redirect_stderr(io.StringIO()) as said:
            exit_code = run_job(folder)
        if exit_code != 0:
            raise SystemExit(said.getvalue())
        record = Record.read(folder)
    assert record is not None
    planned, measured = (
        max(line["allocated_peak_bytes"] for line in lines if line["phase"] == "forward") - base_bytes
        for lines in (record.fields["plan"]["phases"], record.fields["measured"]["phases"])
    )
    return planned, measured


def main() -> None:
    """Print both tables."""
    torch.set_num_threads(1)
    print(
        f"forward and backward of one weight's delta, {NUM_TOKENS} tokens, {HIDDEN} x {INTERMEDIATE}, float32"
    )
    print(f"{'variant':26}{'factored':>12}{'token loop':>12}{'ratio':>8}{'materialised':>14}{'ratio':>8}")
    for name, npt in VARIANTS.items():
        if npt.target != "gate":
            continue  # several times the work of one weight
        made = make_modulator(npt, HIDDEN, INTERMEDIATE, dtype=torch.float32, device=torch.device("cpu"))
        fast = seconds(factored, made, 4 * REPEATS)
        loop, built = seconds(token_by_token, made, REPEATS), seconds(materialised, made, 3)
        print(
            f"{name:26}{fast * 1e3:9.1f} ms{loop * 1e3:9.1f} ms{loop / fast:8.1f}"
            f"{built * 1e3:11.1f} ms{built / fast:8.1f}"
        )
    print(f"\npeak of a training step beyond the base's weights, {MEMORY_TOKENS} tokens")
    print(f"{'model and variant':40}{'planned':>14}{'measured':>14}{'planned/measured':>18}")
    for model, config in (("llama", LLAMA), ("gpt2", GPT2)):
        for name, npt in VARIANTS.items():
            if npt.target == "gate_up" and config is GPT2:
                continue
            planned, measured = extra_bytes(npt, config)
            sizes = f"{format_bytes(planned):>14}{format_bytes(measured):>14}{planned / measured:18.3f}"
            print(f"{f'{model}, {name}':40}{sizes}")


if __name__ == "__main__":
    main()
