"""The weight delta and its norm, against their definitions."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from npt_models import LiveStorages  # noqa: E402

from memplan.npt.loss import EquivalenceLoss  # noqa: E402
from memplan.npt.modulator import DiagonalModulator  # noqa: E402

pytestmark = pytest.mark.torch


def modulator(*, excited: bool = True, seed: int = 0) -> DiagonalModulator:
    """d = 6, f = 10, r = 3 in float64; `excited` gives it a B and sizes at which tanh is not linear."""
    generator = torch.Generator().manual_seed(seed)
    made = DiagonalModulator(
        6, 10, 3, 0.5, dtype=torch.float64, device=torch.device("cpu"), generator=generator
    )
    if excited:
        with torch.no_grad():
            made.A.mul_(3.0)
            made.B.copy_(torch.randn(made.B.shape, generator=generator, dtype=torch.float64))
    return made


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """x and a, (2, 3, 6) each."""
    generator = torch.Generator().manual_seed(1)
    x, a = torch.randn(2, 2, 3, 6, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), a.requires_grad_()


def delta(made: DiagonalModulator, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return made.low_rank(x, made.encode(a)) @ made.B


def test_delta_is_the_definition_token_by_token():
    """delta(x, a) = x A diag(scale * tanh(a A)) B, and `weight_delta` is that matrix."""
    made = modulator()
    x, a = inputs()
    weights = made.weight_delta(made.encode(a), torch.float64)
    for token in [(0, 0), (1, 2)]:
        expected = made.A @ torch.diag(0.5 * torch.tanh(a[token] @ made.A)) @ made.B
        torch.testing.assert_close(weights[token], expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(delta(made, x, a)[token], x[token] @ expected, rtol=1e-12, atol=1e-14)


def test_delta_is_odd_in_the_attention_output():
    """delta(x, -a) = -delta(x, a), exactly; an even formula would pass every test of size alone."""
    made = modulator()
    x, a = inputs()
    assert torch.equal(delta(made, x, -a), -delta(made, x, a))
    assert delta(made, x, a).abs().max() > 0.1


def test_delta_passes_gradcheck():
    """Gradients by x, a, A and B agree with finite differences in float64."""
    made = modulator()
    x, a = inputs()
    assert torch.autograd.gradcheck(lambda x, a, *_: delta(made, x, a), (x, a, made.A, made.B))


def test_squared_norm_is_that_of_the_matrix_and_passes_gradcheck():
    """R_F by Gram matrices equals the Frobenius norm of the delta that it does not build."""
    made = modulator()
    _, a = inputs()
    m = made.encode(a)
    expected = made.weight_delta(m, torch.float64).square().sum((-1, -2))
    torch.testing.assert_close(made.squared_norm(m), expected, rtol=1e-12, atol=1e-14)
    assert torch.autograd.gradcheck(lambda a, *_: made.squared_norm(made.encode(a)), (a, made.A, made.B))


def test_a_new_modulator_changes_nothing_yet_but_learns_at_once():
    """B = 0 makes the first delta zero, and its gradient is not."""
    made = modulator(excited=False)
    x, a = inputs()
    first = delta(made, x, a)
    assert 0.0 == first.abs().max().item()
    first.sum().backward()
    assert made.B.grad.abs().max() > 1e-3


def test_a_seed_fixes_the_values_and_leaves_the_global_generator_alone():
    """Same seed, same A; another seed, another A; the caller's random numbers do not move."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    made = modulator(excited=False, seed=3)
    assert torch.equal(expected, torch.rand(1))
    assert torch.equal(made.A, modulator(excited=False, seed=3).A)
    assert not torch.equal(made.A, modulator(excited=False, seed=4).A)


@pytest.mark.parametrize("padded", [False, True])
def test_the_equivalence_loss_is_mse_of_the_tokens_that_count(padded):
    """Value and gradient equal `mse_loss` over the unpadded tokens, also under gradcheck."""
    output, target = inputs()
    target = target.detach()
    padding = torch.tensor([[False, False, padded], [False, padded, padded]])
    num_elements = int((~padding).sum()) * 6
    arguments = (target, padding if padded else None, num_elements)
    expected = torch.nn.functional.mse_loss(output[~padding], target[~padding])
    actual = EquivalenceLoss.apply(output, *arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0.0)
    (expected_grad,) = torch.autograd.grad(expected, output)
    (actual_grad,) = torch.autograd.grad(actual, output)
    torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-12, atol=1e-15)
    assert torch.autograd.gradcheck(lambda output: EquivalenceLoss.apply(output, *arguments), (output,))


def test_the_equivalence_loss_of_float16_neither_overflows_nor_loses_the_scale():
    """Errors of 1000 square to 1e6, beyond float16; a coefficient of 1e-9 times the scale is rounded once."""
    output = torch.full((1, 4, 8), 1000.0, dtype=torch.float16, requires_grad=True)
    loss = EquivalenceLoss.apply(output, torch.zeros_like(output), None, 10**9)
    assert torch.float32 == loss.dtype
    assert 32e6 / 1e9 == pytest.approx(loss.item())
    with LiveStorages([output]) as storages:
        (loss * 1024.0).backward()
    assert ("float32", (1, 4, 8)) in {event[2:4] for event in storages.events}, "scaled in float32"
    assert torch.float16 == output.grad.dtype
    assert 2 * 1000.0 * 1024.0 / 1e9 == pytest.approx(output.grad[0, 0, 0].item(), rel=1e-3)
