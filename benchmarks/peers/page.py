"""docs/peers.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.peers.errors import STATISTICS, Tool, beside
from benchmarks.summary import summarize

METHODS = ("full", "lora", "qlora")

HEAD = """# Other tools on the same runs

Written by `python -m benchmarks.peers --python PATH`, where PATH is the interpreter of an environment that the other
tools are installed in; do not edit. Errors and versions are of that run; CPU times depend on the machine.

Everybody is asked about the same {count} published runs: those of [accuracy](accuracy.md) under "transformers, one
GPU", which are complete, with the statistics that their sources measured. `allocated` is the peak of live tensors,
`reserved` that of the allocator's segments, `device` what nvidia-smi shows. A tool is compared in the statistics
that it says it predicts, or that its own terms add up to. Error is predicted / measured - 1; "too low" is the share
of answers more than 0.5 % below the measurement. "memplan there" is the median of `memplan, shape` on the same runs
in the same statistic.

What a job cannot say to anybody: {kernels} of the runs had fused Triton kernels. `memplan, shape` is what
`memplan estimate` answers from the job alone. `told the software` knows the versions and kernels that the source names,
as in the table of accuracy. `trace` runs the real model of the installed versions, and refuses training loops that it
does not know.

Not everything is equal. memplan was developed with these runs in sight, the others were not, but for canifinetune and
torch-preflight: the runs `cift-*` and `preflight-*` are measurements that their own authors published. The others are
asked about things that they were not made for, as far as their own interfaces let one ask. fitcheck-llm and fitscout
count a float32 copy of the weights in full fine-tuning, which these bfloat16 runs do not hold.
"""

STATES = """
## What they take

Peers were told the job, the `config.json`, the exact number of parameters and the size of the card, through their
Python functions, without the network. CPU seconds: a process that gives one answer, and a further answer in a warm
process.
"""

LEFT_OUT = """
## Not compared

| tool | why |
| --- | --- |
| hf-mem 0.5.6 | predicts inference, and reads the headers of weights over the network |
| llmfit 1.1.17, gpu-memory-guard 0.1.1 | choose or check models for inference; no training job can be said |
| qmemcalc 0.1.1 | reads the model over the network |
| vram-check 0.1.1 | a general model inspector; LoRA and checkpointing cannot be said |
| llm-analysis 0.2.2 | pre-training in the manner of Megatron-LM; its requirements exclude transformers 5 |
| DeepSpeed's estimators | states of ZeRO over several GPUs |
"""


def render(
    tools: Sequence[Tool], measured: Mapping[str, Mapping[str, int]], methods: Mapping[str, str], kernels: int
) -> str:
    """
    The page.

    Args:
        tools: memplan's plain answers first.
        measured: bytes by run and statistic.
        methods: `full`, `lora` or `qlora`, by run.
        kernels: how many runs had fused kernels.
    """
    parts = [HEAD.format(count=len(measured), kernels=kernels), _errors(tools, measured)]
    parts += [_by_method(tools, measured, methods), STATES]
    parts += [_costs(tools, len(measured)), _refusals(tools), LEFT_OUT]
    return "".join(parts)


def _errors(tools: Sequence[Tool], measured: Mapping[str, Mapping[str, int]]) -> str:
    lines = []
    for statistic in STATISTICS:
        baseline = tools[0].errors(measured, statistic)
        for tool in tools:
            errors = tool.errors(measured, statistic)
            if errors:
                summary, same = summarize(list(errors.values())), beside(errors, baseline)
                cells = [statistic, tool.name, f"{summary.count}", f"{summary.median:.1%}"]
                cells += [f"{summary.worst:+.1%}", f"{summary.too_low / summary.count:.0%}"]
                lines.append([*cells, "" if same is None or tool is tools[0] else f"{same.median:.1%}"])
    header = ["statistic", "tool", "runs", "median", "worst", "too low", "memplan there"]
    return "\n## Errors\n\n" + _table(header, lines, 5)


def _by_method(
    tools: Sequence[Tool], measured: Mapping[str, Mapping[str, int]], methods: Mapping[str, str]
) -> str:
    lines = []
    for statistic in STATISTICS:
        for tool in tools:
            errors = tool.errors(measured, statistic)
            cells = []
            for method in METHODS:
                found = [error for run, error in errors.items() if methods[run] == method]
                cells.append(f"{summarize(found).median:.1%} of {len(found)}" if found else "")
            if errors:
                lines.append([statistic, tool.name, *cells])
    return "\n## Medians by method\n\n" + _table(["statistic", "tool", *METHODS], lines, len(METHODS))


def _costs(tools: Sequence[Tool], count: int) -> str:
    lines = []
    for tool in tools:
        answered = sum("predicted" in reply for reply in tool.replies)
        version = tool.version or "not installed"
        lines.append([tool.name, version, f"{answered} of {count}", _seconds(tool.process_seconds)])
        lines[-1].append(_seconds(tool.warm_seconds))
    return "\n" + _table(["tool", "version", "answered", "process", "warm"], lines, 3)


def _refusals(tools: Sequence[Tool]) -> str:
    lines = [[tool.name, word, str(count)] for tool in tools for word, count in tool.refusals().most_common()]
    return "\n## What was not answered\n\n" + _table(["tool", "instead of an answer", "runs"], lines, 1)


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.4f}" if seconds < 0.01 else f"{seconds:.2f}"


def _table(header: Sequence[str], lines: Sequence[Sequence[str]], numbers: int) -> str:
    rule = ["---"] * (len(header) - numbers) + ["---:"] * numbers
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *escaped)) + "\n"
