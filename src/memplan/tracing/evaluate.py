"""What `memplan fit` asks of a model that only the trace can plan: its outline, and what a changed job needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from memplan.budget.result import Result
from memplan.job.spec import Job
from memplan.model.architecture import Outline
from memplan.model.stored import read_stored
from memplan.tracing.estimate import estimate_traced
from memplan.train.meta_model import as_transformers


def outline(name: str, config: dict[str, Any]) -> Outline:
    """
    The numbers of a model's text part, as transformers reads them from its `config.json`.

    Raises:
        UnknownModel: the installed transformers knows no such model type.
        ModelError: it knows it, and does not take what the config says.
        NotTrained: the weights are stored as is not planned.
    """
    text = as_transformers(config).get_text_config()

    def number(key: str) -> int:
        value = getattr(text, key, None)
        return value if isinstance(value, int) else 0

    width, heads = number("hidden_size"), number("num_attention_heads")
    return Outline(
        name=name,
        family=str(config.get("model_type")),
        hidden_size=width,
        num_hidden_layers=number("num_hidden_layers"),
        head_dim=number("head_dim") or (width // heads if heads else width),
        max_position_embeddings=number("max_position_embeddings"),
        attn_logit_softcapping=getattr(text, "attn_logit_softcapping", None),
        stored=read_stored(config, name),
    )


@dataclass(frozen=True)
class TracedEstimate:
    """`memplan.fit.Evaluate` by traces of one model, each job traced once."""

    config: dict[str, Any]
    """The model's `config.json`."""
    results: dict[Job, Result] = field(default_factory=dict)

    def lower_bound_bytes(self, job: Job) -> int:
        """Live bytes at the peak of two micro batches: those that follow are like the second."""
        result = self._result(
            job.replace(gradient_accumulation_steps=min(job.gradient_accumulation_steps, 2))
        )
        return result.peak.allocated_bytes + result.peak.non_torch_bytes

    def need_bytes(self, job: Job) -> int:
        """The smallest capacity at which the replay completes."""
        return self._result(job).need_bytes

    def _result(self, job: Job) -> Result:
        if job not in self.results:
            _, self.results[job] = estimate_traced(job, self.config)
        return self.results[job]
