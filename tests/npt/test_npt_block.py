"""The NPT block inside transformers models: the formula, the base mode, caches and checkpointing."""

from __future__ import annotations

import copy

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from npt_models import FAMILIES, VARIANTS, LiveStorages, defined_delta, excite, gradients, tiny, token_ids  # noqa: E402

from memplan.job.spec import Npt  # noqa: E402
from memplan.npt import convert, set_mode  # noqa: E402

pytestmark = pytest.mark.torch


def explicit_linear(layer, modulator, x, a):
    """A linear layer with a weight of its own for every token: W + delta_W."""
    weight = layer.weight.T if hasattr(layer, "nf") else layer.weight
    rows = []
    for token_x, token_a in zip(x.flatten(0, 1), a.flatten(0, 1)):
        delta_weight, delta_bias = defined_delta(modulator, token_a)
        row = torch.nn.functional.linear(token_x, weight + delta_weight.T, layer.bias)
        rows.append(row + delta_bias)
    return torch.stack(rows).view(*x.shape[:2], -1)


def explicit_mlp(block, x, a):
    """The MLP of `block` with weights of its own for every token, then the original formula."""
    mlp, up = block.mlp, block.np.up
    if hasattr(mlp, "gate_proj"):
        raised = mlp.up_proj(x) if up is None else explicit_linear(mlp.up_proj, up, x, a)
        inner, last = mlp.act_fn(explicit_linear(mlp.gate_proj, block.np, x, a)) * raised, mlp.down_proj
    else:
        inner, last = mlp.act(explicit_linear(mlp.c_fc, block.np, x, a)), mlp.c_proj
    return last(inner) if block.np.down is None else explicit_linear(last, block.np.down, inner, a)


@pytest.mark.parametrize("form", ["factored", "materialised"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_the_mlp_equals_one_with_a_weight_per_token(family, variant, form):
    """float64: values and gradients by x, a and the trained tensors agree with W + delta_W, in both forms."""
    npt = Npt(layers="all", rank=5, form=form, **VARIANTS[variant])
    if family == "gpt2" and npt.target == "gate_up":
        pytest.skip("GPT-2 has one input matrix")
    model = tiny(family, num_layers=1).double()
    block = convert(model, npt, dtype=torch.float64)[0]
    excite([block])
    torch.manual_seed(3)
    x = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    a = torch.randn(2, 7, 32, dtype=torch.float64, requires_grad=True)
    leaves = (x, a, *block.np.parameters())
    expected = explicit_mlp(block, x, a)
    actual = block._student_mlp(x, block._encode(a))
    without = block._student_mlp(x, block._encode(torch.zeros_like(a)))
    assert (actual - without).abs().max() > 0.1 * actual.abs().max(), "the modulation must matter here"
    size = expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13 * size)
    probe = torch.randn_like(expected)
    expected_grads = torch.autograd.grad((expected * probe).sum(), leaves)
    actual_grads = torch.autograd.grad((actual * probe).sum(), leaves)
    for expected_grad, actual_grad in zip(expected_grads, actual_grads):
        size = expected_grad.abs().max().item()
        torch.testing.assert_close(actual_grad, expected_grad, rtol=1e-11, atol=1e-12 * size)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_block_is_its_definition(family):
    """out = h + MLP'(LN2(h), Attn(LN1(h))): attention leaves the residual and acts on the weight alone."""
    model = tiny(family, num_layers=2)
    blocks = convert(model, Npt(layers=(1,), rank=5))
    excite(blocks)
    seen = {}
    block = blocks[0]
    attention = block.self_attn if hasattr(block, "self_attn") else block.attn
    attention.register_forward_hook(lambda module, args, out: seen.update(a=out[0]))
    block.register_forward_hook(lambda module, args, out: seen.update(h=args[0], out=out))
    with torch.no_grad():
        model(token_ids())
        norm = block.post_attention_layernorm if hasattr(block, "self_attn") else block.ln_2
        expected = seen["h"] + explicit_mlp(block, norm(seen["h"]), seen["a"])
    torch.testing.assert_close(seen["out"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_base_mode_is_the_untouched_model_bit_for_bit(family, attention):
    """Logits in `base` mode equal those before conversion, with padding too; in `npt` mode they do not."""
    model = tiny(family, attn_implementation=attention)
    mask = torch.ones(2, 11, dtype=torch.long)
    mask[1, :4] = 0
    with torch.no_grad():
        expected = model(token_ids(), attention_mask=mask).logits
        excite(convert(model, Npt(layers="all", rank=5)))
        set_mode(model, "base")
        assert torch.equal(expected, model(token_ids(), attention_mask=mask).logits)
        set_mode(model, "npt")
        assert not torch.allclose(expected, model(token_ids(), attention_mask=mask).logits, atol=0.1)


@pytest.mark.parametrize("family", FAMILIES)
def test_eager_and_sdpa_attention_agree(family):
    """The block hands the same mask and positions to either implementation."""
    logits = []
    for attention in ("eager", "sdpa"):
        model = tiny(family, attn_implementation=attention)
        excite(convert(model, Npt(layers="all", rank=5)))
        with torch.no_grad():
            logits.append(model(token_ids()).logits)
    torch.testing.assert_close(*logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("family", "variant"), [*((family, "diag") for family in FAMILIES), *(("llama", v) for v in VARIANTS)]
)
def test_generation_with_and_without_cache_is_equal(family, variant):
    """Eight greedy tokens, and the logits of a cached step equal those of the whole sequence."""
    model = tiny(family)
    excite(convert(model, Npt(layers=(1, 3), rank=5, **VARIANTS[variant])), std=0.3)
    ids = token_ids(1, 6)
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    assert cached.shape[1] > ids.shape[1]
    with torch.no_grad():
        whole = model(ids).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        step = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_activation_checkpointing_leaves_gradients_as_they_are(family, use_reentrant):
    """End-to-end gradients of A and B are equal with and without checkpointing, which recomputes blocks."""
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family == "gpt2" else {}
    model = tiny(family, **dropout).train()
    blocks = convert(model, Npt(layers="all", rank=5))
    excite(blocks, std=0.1)
    calls = []
    mlp_in = blocks[1].mlp.gate_proj if hasattr(blocks[1].mlp, "gate_proj") else blocks[1].mlp.c_fc
    mlp_in.register_forward_hook(lambda *_: calls.append(1))

    def step():
        calls.clear()
        model.zero_grad()
        model(token_ids(), labels=token_ids()).loss.backward()
        return gradients(blocks), len(calls)

    if use_reentrant:
        model.enable_input_require_grads()
    expected, plain_calls = step()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    actual, checkpointed_calls = step()
    assert (1, 2) == (plain_calls, checkpointed_calls)
    assert torch.equal(expected, actual)
    assert expected.abs().max() > 0


@pytest.mark.parametrize("mode", ["npt", "local"])
@pytest.mark.parametrize(
    ("family", "variant"), [("gpt2", "diag"), ("gpt2", "outer sum"), *(("llama", v) for v in VARIANTS)]
)
def test_no_tensor_is_larger_than_the_mlp_inner_activation(family, variant, mode):
    """Forward and backward of the factored form: N * f elements; of the materialised one: N * d * f."""
    largest = {}
    for form in ("factored", "materialised"):
        model = tiny(family, num_layers=1, hidden_size=32, intermediate_size=112)
        block = convert(model, Npt(layers="all", rank=5, form=form, **VARIANTS[variant]))[0]
        excite([block])
        set_mode(model, mode)
        h = torch.randn(2, 24, 32, requires_grad=mode == "npt")
        arguments = {}
        if family == "llama":
            arguments["position_embeddings"] = model.model.rotary_emb(h, torch.arange(24)[None])
        with LiveStorages([h, *model.parameters()]) as storages:
            out = block(h, **arguments)
            if mode == "npt":
                out.square().mean().backward()
        largest[form] = storages.largest_bytes
    num_inner_bytes = 2 * 24 * 112 * 4
    assert num_inner_bytes == largest["factored"]
    assert num_inner_bytes * 32 == largest["materialised"]


def test_hidden_states_and_attentions_are_still_recorded():
    """`output_hidden_states` and `output_attentions` see converted blocks, whose class has changed."""
    model = tiny("llama", num_layers=3, attn_implementation="eager")
    convert(model, Npt(layers="all", rank=5))
    with torch.no_grad():
        out = model(token_ids(), output_hidden_states=True, output_attentions=True)
    assert (4, 3) == (len(out.hidden_states), len(out.attentions))


def test_a_converted_model_can_be_copied():
    """`copy.deepcopy` gives an independent model: modes and parameters of one do not move the other."""
    model = tiny("llama")
    excite(convert(model, Npt(layers="all", rank=5)))
    twin = copy.deepcopy(model)
    set_mode(twin, "base")
    with torch.no_grad():
        assert not torch.equal(model(token_ids()).logits, twin(token_ids()).logits)
        set_mode(twin, "npt")
        assert torch.equal(model(token_ids()).logits, twin(token_ids()).logits)
