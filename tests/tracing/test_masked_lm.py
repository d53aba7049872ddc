"""Encoders with a masked-language-model head: what a trace builds of them, and what is refused."""

from __future__ import annotations

import pytest

from memplan.errors import JobError, UnknownModel
from memplan.tracing.writer import Traced, trace_job
from tracing.comparison import compare
from tracing.tiny import CONFIGS, job

ROBERTA = CONFIGS["bert"] | {"model_type": "roberta", "architectures": ["RobertaForMaskedLM"]}
DISTILBERT = {
    "model_type": "distilbert", "architectures": ["DistilBertForMaskedLM"], "vocab_size": 1000, "dim": 64,
    "hidden_dim": 176, "n_layers": 6, "n_heads": 4,
}  # fmt: skip


def loss_shapes(traced: Traced) -> list[tuple[int, ...] | None]:
    """Shapes of what the trace saw of head and loss."""
    events = traced.flatten().events
    seen = [traced.describe(event) for event in events if event > 0]
    return [storage.shape for storage in seen if storage.category == "logits_loss"]


@pytest.mark.parametrize("loop", ["memplan", "script", "hf_trainer"])
def test_labels_are_of_the_tokens_themselves(loop: str) -> None:
    """All positions have logits, and nothing is made of labels that are shifted, as a decoder's are."""
    traced = trace_job(job(method="lora", loop=loop, lora__target_modules="[query,value]"), ROBERTA)
    shapes = loss_shapes(traced)
    decoder = loss_shapes(trace_job(job(method="lora", loop=loop), CONFIGS["llama"]))

    assert (256, 1000) in shapes
    assert (2, 129) in decoder
    assert (2, 129) not in shapes
    assert traced.unknown_values == 0


def test_a_head_of_loose_parts_needs_a_loop_that_calls_the_model() -> None:
    assert (256, 1000) in loss_shapes(trace_job(job(loop="script"), DISTILBERT))
    with pytest.raises(UnknownModel, match="no module of its own"):
        trace_job(job(), DISTILBERT)


def test_what_only_decoders_have_is_refused() -> None:
    for fields, words in (
        ({"loss": "fused"}, "a bias and a transform"),
        ({"packing": True}, "is an encoder"),
    ):
        with pytest.raises(JobError, match=words):
            trace_job(job(**fields), ROBERTA)


def test_fsdp_casts_the_input_of_a_block() -> None:
    """Under autocast the last norm of a block gives float32, of which FSDP makes 16 bits for the next."""
    fields = {"parallel__strategy": "FULL_SHARD", "parallel__dp_shard": 2, "dtype": "float32"}
    both = compare(job(autocast="bfloat16", attention="eager", **fields), CONFIGS["bert"])
    shape, trace = both.peaks()

    assert shape == pytest.approx(trace, rel=0.001)
