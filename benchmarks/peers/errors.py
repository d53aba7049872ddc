"""How far off a tool's answers are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.summary import Summary, summarize

STATISTICS = ("allocated", "reserved", "device")


@dataclass(frozen=True)
class Tool:
    """A tool's replies: `{id, predicted: {statistic: bytes}, seconds}` or `{id, word}`."""

    name: str
    version: str | None
    """None: not installed."""
    replies: Sequence[Mapping[str, Any]] = ()
    process_seconds: float | None = None
    """CPU time of a process that gives one answer."""

    @property
    def warm_seconds(self) -> float | None:
        """CPU time of an answer in a warm process: the median of all but the first."""
        seconds = [reply["seconds"] for reply in self.replies if "predicted" in reply][1:]
        return median(seconds) if seconds else None

    def errors(self, measured: Mapping[str, Mapping[str, int]], statistic: str) -> dict[str, float]:
        """predicted / measured - 1 by run, where both are known. `measured`: bytes by run and statistic."""
        found = {}
        for reply in self.replies:
            predicted = reply.get("predicted", {}).get(statistic)
            truth = measured[reply["id"]].get(statistic)
            if predicted is not None and truth:
                found[reply["id"]] = predicted / truth - 1
        return found

    def refusals(self) -> Counter[str]:
        """How many runs got each word instead of an answer."""
        return Counter(reply["word"] for reply in self.replies if "word" in reply)


def beside(errors: Mapping[str, float], others: Mapping[str, float]) -> Summary | None:
    """The other tool on the same runs; None where it does not answer them all."""
    if not errors or not errors.keys() <= others.keys():
        return None
    return summarize([others[run] for run in errors])
