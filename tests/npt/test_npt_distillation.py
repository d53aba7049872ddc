"""End-to-end equivalence: the loss on last hidden states, with the base's weights as the teacher."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from npt_models import FAMILIES, excite, gradients, tiny, token_ids  # noqa: E402

from memplan.job.spec import Npt  # noqa: E402
from memplan.npt import convert, end_to_end, read_metrics, set_mode  # noqa: E402

pytestmark = pytest.mark.torch


def inputs(ids=None):
    """What the decoder is called with."""
    return {"input_ids": token_ids() if ids is None else ids, "use_cache": False}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_teacher_is_the_untouched_model(family):
    """Loss, relative error and gradients are those of a comparison with a copy made before conversion."""
    model = tiny(family).double()
    teacher = copy.deepcopy(model).base_model
    blocks = convert(model, Npt(rank=5, regularization=0.0), dtype=torch.float64)
    excite(blocks, std=0.1)
    found = end_to_end(model, model.base_model, inputs(), None)
    loss, error = found.objective, found.relative_error
    loss.backward()
    actual = gradients(blocks)

    model.zero_grad()
    set_mode(model, "npt")
    with torch.no_grad():
        target = teacher(**inputs()).last_hidden_state
    expected = torch.nn.functional.mse_loss(model.base_model(**inputs()).last_hidden_state, target)
    expected.backward()
    # Norms of transformers compute in float32, even of float64 models.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0.0)
    torch.testing.assert_close(error, expected / target.square().mean(), rtol=1e-5, atol=0.0)
    size = actual.abs().max().item()
    assert size > 0
    torch.testing.assert_close(actual, gradients(blocks), rtol=1e-4, atol=1e-5 * size)


def test_padding_does_not_count():
    """What stands in padded places changes neither loss nor gradients."""
    model = tiny()
    blocks = convert(model, Npt(rank=5))
    excite(blocks, std=0.1)
    mask = torch.ones(2, 11)
    mask[1, 7:] = 0
    results = []
    for padding_id in (0, 40):
        ids = token_ids()
        ids[1, 7:] = padding_id
        model.zero_grad()
        found = end_to_end(
            model, model.base_model, inputs(ids), mask, head=model.lm_head, logits_weight=0.3, temperature=2.0
        )
        found.objective.backward()
        scalars = [found.objective.detach()[None], found.relative_error[None], found.delta_norm]
        results.append(torch.cat([*scalars, gradients(blocks)]))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_it_falls_on_a_fixed_batch():
    """Sixty steps on 16 tokens take the loss of two blocks below a fifth of its start."""
    model = tiny("llama", initializer_range=0.15)
    blocks = convert(model, Npt(rank=16, modulation_scale=1.0, target="gate_up", bias=True), seed=0)
    parameters = [parameter for block in blocks for parameter in block.np.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = end_to_end(model, model.base_model, inputs(token_ids(1, 16)), None).objective
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_objective_is_the_sum_of_its_terms():
    """(1 - w) hidden + w divergence + regularization * mean norm, with the gradient of each."""
    results = {}
    for name, regularization, weight in (("hidden", 0.0, 0.0), ("logits", 0.0, 1.0), ("both", 0.5, 0.25)):
        model = tiny()
        blocks = convert(model, Npt(rank=5, regularization=regularization))
        excite(blocks, std=0.3)
        found = end_to_end(
            model, model.base_model, inputs(), None, head=model.lm_head, logits_weight=weight, temperature=2.0
        )
        found.objective.backward()
        results[name] = found.objective.detach(), gradients(blocks), found.delta_norm
    model = tiny()
    blocks = convert(model, Npt(rank=5))
    excite(blocks, std=0.3)
    set_mode(model, "local", backward="never")
    model(token_ids())
    metrics = read_metrics(model)
    torch.testing.assert_close(results["both"][2][0], metrics.delta_norm[0], rtol=1e-5, atol=0.0)
    expected = 0.75 * results["hidden"][0] + 0.25 * results["logits"][0] + 0.5 * results["both"][2].mean()
    torch.testing.assert_close(results["both"][0], expected, rtol=1e-5, atol=0.0)
    mixed = 0.75 * results["hidden"][1] + 0.25 * results["logits"][1]
    assert (results["both"][1] - mixed).norm() > 0.1 * mixed.norm(), "the penalty has a gradient"
