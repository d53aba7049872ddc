"""What encoders with a masked-language-model head, such as BERT, cannot be asked for."""

from __future__ import annotations

from memplan.errors import JobError
from memplan.job.spec import Job


def refuse_for_encoder(job: Job) -> None:
    """
    Refuse a job of an encoder that asks for what only decoders have.

    Raises:
        JobError: `loss` other than the full one, since the head transforms the hidden states and has a bias; or
            `packing`, since an encoder's attention takes no notice of where documents begin.
    """
    if job.loss not in ("auto", "full"):
        raise JobError(
            f"`loss: {job.loss}` needs an output head that is one linear layer without bias, and the head of "
            f"`{job.model}` has a bias and a transform in front of it",
            hint="use `--set loss=full`",
        )
    if job.packing or job.padding_free:
        field = "packing" if job.packing else "padding_free"
        raise JobError(
            f"`{field}: true` needs attention that keeps documents apart, and `{job.model}` is an encoder, whose "
            "tokens see all others",
            hint=f"use `--set {field}=false`",
        )
