"""What a run measures of NPT blocks on other text: cross-entropy with them on and off, in little memory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from npt_models import LiveStorages, excite  # noqa: E402

from memplan.job.spec import Job, Npt  # noqa: E402
from memplan.npt import npt_blocks, set_mode  # noqa: E402
from memplan.train.build import build_model  # noqa: E402
from memplan.train.data import IGNORE_INDEX, MicroBatch  # noqa: E402
from memplan.train.loop import Loop  # noqa: E402
from memplan.train.loss import evaluation_cross_entropy, full_cross_entropy  # noqa: E402

pytestmark = pytest.mark.torch

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 600, "hidden_size": 32,
    "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "initializer_range": 0.25,
}  # fmt: skip
PADDING = 5


@dataclass
class Pass:
    """Batches of one pass: whole rows, and rows that are padded at the end."""

    input_ids: torch.Tensor

    def one_pass(self) -> Iterator[MicroBatch]:
        for padding in (0, PADDING):
            labels = self.input_ids.clone()
            mask = torch.ones_like(labels, dtype=torch.bool)
            if padding:
                labels[:, -padding:] = IGNORE_INDEX
                mask[:, -padding:] = False
            yield MicroBatch(self.input_ids, labels, None, mask if padding else None)


def make_loop(length: int = 16) -> tuple[Loop, Pass]:
    """A loop whose model has NPT blocks far from equivalence."""
    job = Job(model="tiny", weights="random", method="npt", dtype="float32", npt=Npt(layers="all", rank=4))
    built = build_model(job, CONFIG, torch.device("cpu"), weights_path=None)
    excite(npt_blocks(built.model))
    ids = torch.randint(0, 600, (2, length), generator=torch.Generator().manual_seed(0))
    batches = Pass(ids)
    return Loop(job, built, torch.optim.SGD(built.trainable), batches, torch.device("cpu")), batches  # type: ignore[arg-type]


def test_cross_entropy_of_both_modes_is_that_of_transformers():
    """Nats per predicted token over the pass, of the base and of the converted model; padding does not count."""
    loop, batches = make_loop()
    measured = loop.npt.cross_entropies(batches.one_pass())
    model = loop.built.model
    for mode in ("base", "npt"):
        set_mode(model, mode)
        total = num_tokens = 0.0
        with torch.no_grad():
            for batch in batches.one_pass():
                count = int((batch.labels[:, 1:] != IGNORE_INDEX).sum())
                total += model(batch.input_ids, labels=batch.labels).loss.item() * count
                num_tokens += count
        assert measured[mode] == pytest.approx(total / num_tokens, rel=1e-5)
    assert abs(measured["base"] - measured["npt"]) > 0.01


def test_the_loss_in_small_chunks_is_the_loss():
    """More vocabulary than width, so that logits are computed for a few tokens at a time."""
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50)
    hidden, labels = torch.randn(2, 20, 8), torch.randint(0, 50, (2, 20))
    labels[1, 12:] = IGNORE_INDEX
    with torch.no_grad():
        expected = full_cross_entropy(head(hidden), labels, 3)
        torch.testing.assert_close(evaluation_cross_entropy(hidden, head, labels, 3), expected)


def test_evaluation_takes_less_memory_than_a_step():
    """The planner has no phase for it: no logits of all tokens, and nothing kept for backward."""
    loop, batches = make_loop(length=64)
    batch = next(batches.one_pass())
    set_mode(loop.built.model, "local")
    known = [*loop.built.model.parameters(), *loop.built.model.buffers(), batch.input_ids]
    with LiveStorages(known) as step, torch.no_grad():
        loop.parallel(batch)
    with LiveStorages(known) as evaluation:
        loop.npt.cross_entropies(batches.one_pass())
    assert evaluation.peak_bytes < step.peak_bytes
    assert evaluation.largest_bytes < 2 * 64 * 600 * 4, "logits"
