"""
What a line of `metrics.jsonl` says of a step.

    step, loss, learning_rate, tokens, tokens_per_s
    samples                 seen since step 1
    memory                  bytes: allocated on CUDA, resident on the CPU
    relative_error          NPT, by layer: mean square of the difference to the original block over that of the block
    delta_norm              NPT, by layer: mean over tokens of the squared Frobenius norm of the weight deltas
    eval_loss               where the step was evaluated: the loss on `data.eval`
    eval_perplexity         the same as a perplexity; NPT: with the blocks on
    eval_base_perplexity    NPT: with the blocks off
    eval_relative_error, eval_delta_norm    NPT: as above, on `data.eval`
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from memplan.train.loop import Evaluation, StepResult


def metrics_line(
    result: StepResult, seconds: float, memory_bytes: int, global_batch_size: int
) -> dict[str, Any]:
    """One line, without what an evaluation adds to it."""
    line: dict[str, Any] = {
        "step": result.step,
        "loss": result.loss,
        "learning_rate": result.learning_rate,
        "samples": result.step * global_batch_size,
        "tokens": result.num_tokens,
        "tokens_per_s": result.num_tokens / seconds,
        "memory": memory_bytes,
    }
    for name in ("relative_error", "delta_norm"):
        by_layer = getattr(result, name)
        if by_layer is not None:
            line[name] = _with_text_keys(by_layer)
    return line


def evaluation_fields(evaluated: Evaluation) -> dict[str, Any]:
    """What an evaluation adds to the line of its step."""
    if evaluated.npt is None or evaluated.cross_entropies is None:
        return {"eval_loss": evaluated.loss, "eval_perplexity": _perplexity(evaluated.loss)}
    return {
        "eval_loss": evaluated.loss,
        "eval_perplexity": _perplexity(evaluated.cross_entropies["npt"]),
        "eval_base_perplexity": _perplexity(evaluated.cross_entropies["base"]),
        "eval_relative_error": _with_text_keys(evaluated.npt.relative_error),
        "eval_delta_norm": _with_text_keys(evaluated.npt.delta_norm),
    }


def npt_table(lines: list[dict[str, Any]]) -> list[str]:
    """
    For the end of an NPT run, from its lines: error of each block at the first and the last step, size of its deltas,
    its error on other data, and the perplexities there. Nothing for other runs.
    """
    if not lines or "relative_error" not in lines[-1]:
        return []
    first, last = lines[0], lines[-1]
    evaluated: dict[str, Any] = next((line for line in reversed(lines) if "eval_relative_error" in line), {})
    errors = evaluated.get("eval_relative_error", {})
    norms = last.get("delta_norm") or evaluated.get("eval_delta_norm", {})
    heads = (
        "NPT block",
        f"error of step {first['step']}",
        f"of step {last['step']}",
        "delta norm",
        "error on data.eval",
    )
    rows: list[tuple[str, ...]] = [heads]
    for layer in {**last["relative_error"], **errors}:
        cells = [line["relative_error"].get(layer) for line in (first, last)]
        cells += [norms.get(layer), errors.get(layer)]
        rows.append((layer.replace("_", " "), *map(_number, cells)))
    if not errors:
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))])
        for row in rows
    ]
    if evaluated:
        npt, base = evaluated["eval_perplexity"], evaluated["eval_base_perplexity"]
        table.append(
            f"perplexity on data.eval after step {evaluated['step']}: {npt:.4g}, of the base {base:.4g}"
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _with_text_keys(by_layer: dict[Any, float]) -> dict[str, float]:
    return {str(layer): value for layer, value in by_layer.items()}


def _perplexity(cross_entropy: float) -> float:
    return math.exp(cross_entropy) if cross_entropy < 700 else math.inf
