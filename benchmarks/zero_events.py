"""
`python -m benchmarks.zero_events`: plans of ZeRO stages 1 and 2 beside what DeepSpeed's own optimizer allocates.

DeepSpeed (`pip install --no-build-isolation deepspeed==0.19.8`, no extension is built) trains a tiny Llama on the CPU
as one rank of three, over a process group that sends nothing. Every storage that its backward passes and its step make
or let go of, from 4 KiB on, is compared with the plan, in order.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import Any

from memplan.job.spec import Job, Lora, Parallel
from memplan.model.architecture import Architecture
from memplan.tape.writer import write_tape
from memplan.tape.zero_groups import DEEPSPEED

RANKS = 3
LEAST_BYTES = 4096
"""Below, kernels of the CPU take scratch that the plan does not have."""
RANK = 16
SMALL = Architecture(
    name="small", family="llama", hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=1001, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
TOKENS = 8
CASES = [(stage, method, micro) for stage in (1, 2) for method in ("full", "lora") for micro in (1, 3)]


def planned(stage: int, method: str, micro_batches: int) -> list[int]:
    """Signed bytes of the first step's backward passes and of its optimizer."""
    job = Job(
        model="small", method=method, max_seq_len=TOKENS, loss="full", loop="script", optimizer_kernel="loop",
        lora=Lora(rank=RANK), gradient_accumulation_steps=micro_batches,
        parallel=Parallel(strategy=f"ZERO_{stage}", dp_shard=RANKS),
    )  # fmt: skip
    tape = write_tape(job, SMALL, device="cpu").flatten()
    found = []
    for mark, following in zip(tape.marks, tape.marks[1:]):
        if mark.step == 1 and mark.phase in ("backward", "optimizer_step"):
            for event in tape.events[mark.event : following.event]:
                found.append(tape.sizes[abs(event)] * (1 if event > 0 else -1))
    return [size for size in found if abs(size) >= LEAST_BYTES]


def allocated(stage: int, method: str, micro_batches: int) -> list[int]:
    """The same of DeepSpeed's own engine; once per process, since it keeps its process group."""
    import torch

    engine, recorder = _engine(stage, method, micro_batches)
    ids = torch.zeros((1, TOKENS), dtype=torch.int64)
    found: list[int] = []
    with recorder:
        for _ in range(micro_batches):
            output = engine(input_ids=ids, labels=ids)
            begin = len(recorder.events)
            engine.backward(output.loss)
            found += recorder.events[begin:]
            begin = len(recorder.events)
            engine.step()
            found += recorder.events[begin:]
    return [size for size in found if abs(size) >= LEAST_BYTES]


def _engine(stage: int, method: str, micro_batches: int) -> tuple[Any, Any]:
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
    logging.disable(logging.CRITICAL)
    import deepspeed
    import torch
    import torch.distributed as dist
    from peft import LoraConfig, get_peft_model
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    dist.init_process_group("fake", store=FakeStore(), rank=0 if stage == 1 else RANKS - 1, world_size=RANKS)
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    config = LlamaConfig(**{name: getattr(SMALL, name) for name in names}, use_cache=False)
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": SMALL.hidden_size**2},
    }
    recorder = _recorder()
    with recorder:
        optimizer = torch.optim.AdamW(trained, foreach=False)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
    return engine, recorder


def _recorder() -> Any:
    """A dispatch mode that sees storages come and go."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.events: list[int] = []
            self.held: dict[int, Any] = {}

        def see(self, tensor: Any) -> None:
            if not isinstance(tensor, Tensor):
                return
            storage = tensor.untyped_storage()
            key, num_bytes = storage._cdata, storage.nbytes()
            if key not in self.held:
                self.events.append(num_bytes)
                self.held[key] = weakref.ref(storage, lambda _: self.drop(key, num_bytes))

        def drop(self, key: int, num_bytes: int) -> None:
            del self.held[key]
            self.events.append(-num_bytes)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            for leaf in tree_leaves((args, kwargs)):
                self.see(leaf)
            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                self.see(leaf)
            return out

    return Recorder()


def main(arguments: Sequence[str]) -> int:
    """A row per case; 1 if any event differs. With a case as arguments: DeepSpeed's events, as JSON."""
    if arguments:
        stage, method, micro_batches = arguments
        print(json.dumps(allocated(int(stage), method, int(micro_batches))))
        return 0
    print(f"DeepSpeed {DEEPSPEED}, {RANKS} ranks\nstage  method  micro batches  events  like the plan")
    is_alike = True
    for stage, method, micro_batches in CASES:
        command = [sys.executable, "-m", "benchmarks.zero_events", str(stage), method, str(micro_batches)]
        answer = subprocess.run(command, capture_output=True, text=True)
        if answer.returncode:
            print(answer.stderr.strip().splitlines()[-1], file=sys.stderr)
            print(f"\nhint: this takes deepspeed=={DEEPSPEED}, transformers and peft", file=sys.stderr)
            return 2
        own = json.loads(answer.stdout.splitlines()[-1])
        plan = planned(stage, method, micro_batches)
        blocks = SequenceMatcher(None, own, plan, autojunk=False).get_matching_blocks()
        alike = sum(block.size for block in blocks)
        is_alike &= own == plan
        print(f"{stage:5}  {method:6}  {micro_batches:13}  {len(own):6}  {alike:13}")
    return 0 if is_alike else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
