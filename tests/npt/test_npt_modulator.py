"""The weight delta and its norm, against their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")

from npt_models import VARIANTS, LiveStorages, defined_delta  # noqa: E402

from memplan.job.spec import Npt  # noqa: E402
from memplan.npt.layers import modulator_shapes  # noqa: E402
from memplan.npt.loss import EquivalenceLoss  # noqa: E402
from memplan.npt.modulator import Modulator, make_modulator  # noqa: E402

pytestmark = pytest.mark.torch

every_variant = pytest.mark.parametrize(
    "npt", [Npt(rank=3, modulation_scale=0.5, **fields) for fields in VARIANTS.values()], ids=VARIANTS
)


def modulator(npt: Npt, *, excited: bool = True, seed: int = 0) -> Modulator:
    """d = 6, f = 10 in float64; `excited` gives it a B and sizes at which tanh is not linear."""
    generator = torch.Generator().manual_seed(seed)
    made = make_modulator(npt, 6, 10, dtype=torch.float64, device=torch.device("cpu"), generator=generator)
    if excited:
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return made


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """x and a, (2, 3, 6) each."""
    generator = torch.Generator().manual_seed(1)
    x, a = torch.randn(2, 2, 3, 6, generator=generator, dtype=torch.float64)
    return x.requires_grad_(), a.requires_grad_()


def delta(made: Modulator, x: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return made.low_rank(x, made.encode(a)) @ made.B


@every_variant
def test_delta_is_the_definition_token_by_token(npt):
    """delta(x, a) = x delta_W^T + delta_b by the formulas; `weight_delta` and `bias_delta` are those."""
    made = modulator(npt)
    x, a = inputs()
    code = made.encode(a)
    weights, biases = made.weight_delta(code, torch.float64), made.bias_delta(code, torch.float64)
    close = {"rtol": 1e-12, "atol": 1e-13}
    for token in [(0, 0), (1, 2)]:
        weight, bias = defined_delta(made, a[token])
        torch.testing.assert_close(weights[token], weight, **close)
        torch.testing.assert_close(delta(made, x, a)[token], x[token] @ weight + bias, **close)
        assert (biases is None) == (made.bias is None)
        if biases is not None:
            torch.testing.assert_close(biases[token], bias, **close)


@every_variant
def test_the_variants_are_odd_and_even_in_the_attention_output(npt):
    """delta(x, -a) is exactly -delta(x, a) for diag and linear, and delta(x, a) for outer."""
    made = modulator(npt)
    x, a = inputs()
    sign = 1.0 if npt.variant == "outer" else -1.0
    assert torch.equal(delta(made, x, -a), sign * delta(made, x, a))
    assert delta(made, x, a).abs().max() > 0.1


@every_variant
def test_delta_passes_gradcheck(npt):
    """Gradients by x, a and every trained tensor agree with finite differences in float64."""
    made = modulator(npt)
    x, a = inputs()
    trained = [made.A, made.B, *(p for p in (made.bias, getattr(made, "C", None)) if p is not None)]
    assert torch.autograd.gradcheck(lambda x, a, *_: delta(made, x, a), (x, a, *trained))


@every_variant
def test_squared_norm_is_that_of_the_matrix_and_passes_gradcheck(npt):
    """By Gram matrices: the squared Frobenius norm of the delta that is not built, for each component."""
    made = modulator(npt)
    _, a = inputs()
    code = made.encode(a)
    if npt.variant == "outer":
        z, A = code.unflatten(-1, (npt.components, -1)), made.A.unflatten(-1, (npt.components, -1))
        left = torch.einsum("bskr,dkr->bskd", z, A)
        right = torch.einsum("bskr,krf->bskf", z, made.B.unflatten(0, (npt.components, -1)))
        expected = torch.einsum("bskd,bskf->bskdf", left, right).square().sum((-1, -2, -3))
    else:
        expected = made.weight_delta(code, torch.float64).square().sum((-1, -2))
    torch.testing.assert_close(made.squared_norm(code), expected, rtol=1e-12, atol=1e-13)
    trained = [p for p in (made.A, made.B, getattr(made, "C", None)) if p is not None]
    assert torch.autograd.gradcheck(lambda a, *_: made.squared_norm(made.encode(a)), (a, *trained))


def test_the_norm_of_one_component_is_that_of_the_delta():
    """With k = 1 the sum over components is the squared Frobenius norm of delta_W itself."""
    made = modulator(Npt(rank=3, variant="outer"))
    code = made.encode(inputs()[1])
    expected = made.weight_delta(code, torch.float64).square().sum((-1, -2))
    torch.testing.assert_close(made.squared_norm(code), expected, rtol=1e-12, atol=1e-13)


@every_variant
def test_a_new_modulator_changes_nothing_yet_but_learns_at_once(npt):
    """`zero`: the first delta is zero, and the gradient of B is not."""
    made = modulator(npt, excited=False)
    x, a = inputs()
    first = delta(made, x, a)
    assert 0.0 == first.abs().max().item()
    first.sum().backward()
    assert made.B.grad.abs().max() > 1e-3


@every_variant
def test_small_initial_values_are_small_and_random(npt):
    """`small`: B is random, and neither B nor what reads x is larger than a few hundredths."""
    made = modulator(replace(npt, initialization="small"), excited=False)
    assert 0.0 < made.B.abs().max() < 0.05
    assert 0.0 < made.A.abs().max() < 0.05


@every_variant
def test_the_planner_knows_the_shapes(npt):
    """`modulator_shapes` names every trained tensor, in the order of the module's parameters."""
    shapes = {name: tuple(parameter.shape) for name, parameter in modulator(npt).named_parameters()}
    assert modulator_shapes(npt, 6, 10) == shapes
    assert list(modulator_shapes(npt, 6, 10)) == list(shapes)
    ungated = modulator_shapes(npt, 6, 10, is_gated=False)
    assert not any(name.startswith("up.") for name in ungated) or npt.target == "gate_up"


@every_variant
def test_a_seed_fixes_the_values_and_leaves_the_global_generator_alone(npt):
    """Same seed, same A; another seed, another A; the caller's random numbers do not move."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    made = modulator(npt, excited=False, seed=3)
    assert torch.equal(expected, torch.rand(1))
    assert torch.equal(made.A, modulator(npt, excited=False, seed=3).A)
    assert not torch.equal(made.A, modulator(npt, excited=False, seed=4).A)


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
