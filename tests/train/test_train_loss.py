"""The two losses: chunked against full, in value and gradients."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

from memplan.train.loss import ChunkedLinearCrossEntropy, chunked_cross_entropy, full_cross_entropy  # noqa: E402

pytestmark = pytest.mark.torch

BATCH, SEQ, HIDDEN, VOCAB = 2, 9, 6, 13


def _inputs(dtype: torch.dtype, *, trains: bool) -> tuple[torch.Tensor, nn.Linear, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(BATCH, SEQ, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    head = nn.Linear(HIDDEN, VOCAB, bias=False, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype))
    head.weight.requires_grad_(trains)
    labels = torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)
    labels[0, 3] = labels[1, 6:] = -100
    return hidden.requires_grad_(), head, labels


@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 1000])
@pytest.mark.parametrize("trains", [False, True])
def test_chunked_loss_equals_full_loss(trains: bool, chunk_tokens: int) -> None:
    """Value and both gradients agree, whatever the chunks, with labels left out."""
    hidden, head, labels = _inputs(torch.float32, trains=trains)
    expected = full_cross_entropy(head(hidden), labels, 11)
    expected.backward()
    expected_hidden, expected_weight = hidden.grad.clone(), head.weight.grad
    hidden.grad = head.weight.grad = None

    actual = chunked_cross_entropy(hidden, head, labels, 11, chunk_tokens)
    actual.backward()

    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(hidden.grad, expected_hidden)
    if trains:
        torch.testing.assert_close(head.weight.grad, expected_weight)
    else:
        assert head.weight.grad is None


def test_full_loss_is_that_of_transformers() -> None:
    """Shift, ignored labels and normalisation are those of transformers' ForCausalLMLoss."""
    loss_utils = pytest.importorskip("transformers.loss.loss_utils")
    hidden, head, labels = _inputs(torch.float32, trains=False)
    logits = head(hidden)

    expected = loss_utils.ForCausalLMLoss(logits, labels, VOCAB, num_items_in_batch=11)

    torch.testing.assert_close(full_cross_entropy(logits, labels, 11), expected, rtol=0, atol=0)


@pytest.mark.parametrize(("softcap", "scaling"), [(None, None), (2.0, None), (None, 8.0), (2.0, 0.5)])
def test_chunked_loss_passes_gradcheck(softcap: float | None, scaling: float | None) -> None:
    """The gradients written by hand are the derivatives of the value, in float64."""
    hidden, head, labels = _inputs(torch.float64, trains=True)
    flat = hidden.detach().flatten(0, 1).requires_grad_()

    assert torch.autograd.gradcheck(
        lambda h, w: ChunkedLinearCrossEntropy.apply(h, w, labels.flatten(), 11, 4, softcap, scaling),
        (flat, head.weight),
    )


def test_chunked_loss_caps_logits_as_gemma_does() -> None:
    """`cap * tanh(logits / cap)` before the cross-entropy, in value and gradients."""
    cap = 3.0
    gradients = []
    for chunked in (True, False):
        hidden, head, labels = _inputs(torch.float32, trains=True)
        if chunked:
            loss = chunked_cross_entropy(hidden, head, labels, 11, 4, softcap=cap)
        else:
            loss = full_cross_entropy(cap * torch.tanh(head(hidden) / cap), labels, 11)
        loss.backward()
        gradients.append((loss.detach(), hidden.grad, head.weight.grad))

    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("form", ["full", "chunked"])
def test_the_loss_is_what_granite_makes_of_its_logits(form: str) -> None:
    """It divides them by `logits_scaling`; loss and gradients are those of the model's own `forward`."""
    transformers = pytest.importorskip("transformers")
    from memplan.job.load import load_job
    from memplan.train.build import Built
    from memplan.train.data import MicroBatch
    from memplan.train.parallel import Step

    torch.manual_seed(0)
    config = transformers.GraniteConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        logits_scaling=8.0, tie_word_embeddings=True, pad_token_id=None,
    )  # fmt: skip
    model = transformers.GraniteForCausalLM(config)
    ids = torch.randint(0, VOCAB, (BATCH, SEQ))
    expected = model(input_ids=ids, labels=ids, use_cache=False).loss
    expected.backward()
    gradient = model.lm_head.weight.grad.clone()
    model.zero_grad()

    job = load_job(None, ["model=tiny", "method=full", "dtype=float32", f"loss={form}"]).job
    step = Step(job, Built.of(job, model, model, model.model), "cpu")
    loss = step(MicroBatch(ids, ids), BATCH * (SEQ - 1))
    loss.backward()

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.lm_head.weight.grad, gradient)


def test_chunked_loss_adds_to_a_tied_embedding() -> None:
    """A weight that is embedding and head at once gets the sum of both gradients."""
    ids = torch.tensor([[1, 5, 2, 7, 3]])

    def gradient(chunked: bool) -> torch.Tensor:
        torch.manual_seed(0)
        embedding = nn.Embedding(VOCAB, HIDDEN)
        head = nn.Linear(HIDDEN, VOCAB, bias=False)
        head.weight = embedding.weight
        hidden = embedding(ids).tanh()
        if chunked:
            chunked_cross_entropy(hidden, head, ids, 4, 2).backward()
        else:
            full_cross_entropy(head(hidden), ids, 4).backward()
        assert embedding.weight.grad is not None
        return embedding.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False))


def test_chunked_loss_in_bfloat16_is_computed_in_float32() -> None:
    """In bfloat16 the loss is a float32 scalar as good as the full one, and gradients keep their dtypes."""
    hidden, head, labels = _inputs(torch.bfloat16, trains=True)
    exact = full_cross_entropy(nn.functional.linear(hidden.double(), head.weight.double()), labels, 11)

    loss = chunked_cross_entropy(hidden, head, labels, 11, 4)
    loss.backward()

    assert torch.float32 == loss.dtype
    assert abs(loss.item() - exact.item()) < 0.02
    assert (torch.bfloat16, torch.bfloat16) == (hidden.grad.dtype, head.weight.grad.dtype)


def test_chunked_loss_follows_autocast() -> None:
    """Under autocast the head computes in its dtype, and the gradients come back in those of the leaves."""
    hidden, head, labels = _inputs(torch.float32, trains=True)
    exact = full_cross_entropy(head(hidden), labels, 11)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = chunked_cross_entropy(hidden, head, labels, 11, 4)
    loss.backward()

    assert 0 < abs(loss.item() - exact.item()) < 0.02
    assert (torch.float32, torch.float32) == (hidden.grad.dtype, head.weight.grad.dtype)


def test_a_chunk_is_all_that_is_held() -> None:
    """No tensor as large as all logits is ever made, and a frozen head costs no gradient of its size."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                sizes.append(out.numel())
            return out

    hidden = torch.randn(1, 64, 8, requires_grad=True)
    head = nn.Linear(8, 50, bias=False).requires_grad_(False)
    labels = torch.randint(0, 50, (1, 64))
    with Largest():
        chunked_cross_entropy(hidden, head, labels, 63, 16).backward()

    # 64 * 8 elements of the gradient of `hidden` are fewer than the 16 * 50 of a chunk.
    assert max(sizes) == 16 * 50
