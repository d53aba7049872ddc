"""
`python -m benchmarks.zero_events`: plans of ZeRO beside what DeepSpeed's own engine allocates.

DeepSpeed (`pip install --no-build-isolation deepspeed==0.19.8`, no extension is built) trains a tiny Llama on the CPU
as one rank of three, over a process group that sends nothing. What it takes and gives back, from 4 KiB on, is compared
with the plan, in order: of stages 1 and 2 in the backward passes and the step of the first step, as storages come and
go; of stage 3, whose first pass is recorded and whose later ones fetch ahead, in all of the first two steps, as the
allocator sees it.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import weakref
from collections.abc import Sequence
from dataclasses import replace
from difflib import SequenceMatcher
from itertools import groupby
from typing import Any

from memplan.job.spec import Job, Lora, Parallel
from memplan.model.architecture import Architecture
from memplan.tape.behaviour import Behaviour
from memplan.tape.programs.blocks import CPU_RNG_STATE_BYTES
from memplan.tape.sharded.zero_groups import (
    DEEPSPEED,
    persistence_threshold,
    prefetch_elements,
    reduce_bucket_elements,
)
from memplan.tape.writer import write_tape

RANKS = 3
LEAST_BYTES = 4096
"""Below, kernels of the CPU take scratch that the plan does not have."""
RANK = 16
SMALL = Architecture(
    name="small", family="llama", hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, vocab_size=1001, max_position_embeddings=2048, tie_word_embeddings=False,
)  # fmt: skip
TOKENS = 8
TOKENS_OF_STAGE_3 = 48
"""So many that activations are compared too."""
CHECKPOINTED = "full, recomputed", "lora, recomputed"
CASES = [(stage, method, micro) for stage in (1, 2) for method in ("full", "lora") for micro in (1, 3)]
CASES += [(3, "full", 2), (3, "lora", 1), (3, CHECKPOINTED[0], 1), (3, CHECKPOINTED[1], 2)]


def _job(stage: int, case: str, micro_batches: int) -> Job:
    return Job(
        model="small", method=case.partition(",")[0], max_seq_len=TOKENS_OF_STAGE_3 if stage == 3 else TOKENS,
        loss="full", loop="script", optimizer_kernel="loop", attention="eager" if stage == 3 else "sdpa",
        activation_checkpointing="full" if case in CHECKPOINTED else "none",
        lora=Lora(rank=RANK), gradient_accumulation_steps=micro_batches,
        parallel=Parallel(strategy=f"ZERO_{stage}", dp_shard=RANKS),
    )  # fmt: skip


def planned(stage: int, method: str, micro_batches: int) -> list[int]:
    """Signed bytes of the first step's backward passes and of its optimizer; of stage 3, of two whole steps."""
    job = _job(stage, method, micro_batches)
    # What `gradient_checkpointing_enable` of transformers 5 does to a model with adapters.
    behaviour = replace(Behaviour.for_job(job), input_gradients=method == "lora, recomputed")
    tape = write_tape(job, SMALL, device="cpu", behaviour=behaviour).flatten()
    if stage == 3:
        begin = next(mark.event for mark in tape.marks if mark.step == 1)
        signed = [
            tape.sizes[abs(event)] * (1 if event > 0 else -1)
            for event in tape.events[begin : tape.marks[-1].event]
        ]
        return _comparable(signed)
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
    ids = torch.zeros((1, _job(stage, method, micro_batches).max_seq_len), dtype=torch.int64)
    if stage == 3:
        return _profiled(engine, ids, micro_batches)
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


def _profiled(engine: Any, ids: Any, micro_batches: int) -> list[int]:
    """Two steps in torch's profiler: a dispatch mode would keep the engine from adding gradients in place."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)
    output = None
    gc.collect()
    gc.disable()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        for _ in range(2 * micro_batches):
            output = engine(input_ids=ids, labels=ids)
            engine.backward(output.loss)
            engine.step()
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return _comparable([event.nbytes() for event in events])


def _comparable(signed: Sequence[int]) -> list[int]:
    """
    Without what is small and the states of the CPU's random numbers, which on CUDA are not on the device. DeepSpeed
    releases sets of parameters, in the order of their addresses: frees that follow one another are sorted.
    """
    kept = [size for size in signed if LEAST_BYTES <= abs(size) != CPU_RNG_STATE_BYTES]
    runs = groupby(kept, key=lambda size: size < 0)
    return [size for is_free, run in runs for size in (sorted(run) if is_free else run)]


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
    rank = RANKS - 1 if stage == 2 else 0
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=RANKS)
    names = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "vocab_size", "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    job = _job(stage, method, micro_batches)
    config = LlamaConfig(**{name: getattr(SMALL, name) for name in names}, use_cache=False)
    config._attn_implementation = job.attention
    zero: dict[str, int] = {"stage": stage, "reduce_bucket_size": reduce_bucket_elements(SMALL.hidden_size)}
    if stage == 3:
        zero["stage3_prefetch_bucket_size"] = prefetch_elements(SMALL.hidden_size)
        zero["stage3_param_persistence_threshold"] = persistence_threshold(SMALL.hidden_size)
    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "bf16": {"enabled": True},
        "zero_optimization": zero,
    }
    if stage == 3:
        with deepspeed.zero.Init(config_dict_or_path=settings):
            model: Any = LlamaForCausalLM(config)
    else:
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    if job.method == "lora":
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear", task_type="CAUSAL_LM"))
    if job.activation_checkpointing == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
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
    print(
        f"DeepSpeed {DEEPSPEED}, {RANKS} ranks\nstage  method            micro batches  events  like the plan"
    )
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
        print(f"{stage:5}  {method:16}  {micro_batches:13}  {len(own):6}  {alike:13}")
    return 0 if is_alike else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
