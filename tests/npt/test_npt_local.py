"""Layer-wise equivalence training: gradients, streams, padding, memory, dtypes, and that it learns."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from npt_models import FAMILIES, VARIANTS, LiveStorages, excite, gradients, tiny, token_ids  # noqa: E402

from memplan.errors import RunError  # noqa: E402
from memplan.job.spec import Npt  # noqa: E402
from memplan.npt import convert, local_loss, read_metrics, set_mode  # noqa: E402

pytestmark = pytest.mark.torch

NPT = Npt(layers="upper_half", rank=5, regularization=0.03)


def local_step(model, blocks, ids=None, **settings):
    """Gradients of one local forward pass with its backward inside, under no_grad as a trainer runs it."""
    model.zero_grad()
    set_mode(model, "local", **settings)
    with torch.no_grad():
        model(token_ids() if ids is None else ids)
    return gradients(blocks)


@pytest.mark.parametrize(
    ("family", "variant"), [*((family, "diag") for family in FAMILIES), *(("llama", v) for v in VARIANTS)]
)
def test_gradients_equal_those_of_a_recorded_teacher(family, variant):
    """
    float64: backward inside the layers = one backward of the summed loss = that of a loss built from what a
    second, untouched model recorded: inputs, attention outputs and outputs of its blocks.
    """
    model = tiny(family).double()
    teacher = copy.deepcopy(model)
    blocks = convert(model, replace(NPT, **VARIANTS[variant]), dtype=torch.float64)
    excite(blocks)

    now = local_step(model, blocks)
    model.zero_grad()
    set_mode(model, "local", backward="later")
    model(token_ids())
    local_loss(model).backward()
    later = gradients(blocks)

    records = []
    layers = teacher.transformer.h if family == "gpt2" else teacher.model.layers
    for layer in layers[2:]:
        record = {}
        records.append(record)
        attention = layer.attn if family == "gpt2" else layer.self_attn
        attention.register_forward_hook(lambda *call, record=record: record.update(a=call[-1][0]))
        layer.register_forward_hook(lambda _, args, out, record=record: record.update(h=args[0], out=out))
    with torch.no_grad():
        teacher(token_ids())
    model.zero_grad()
    losses = []
    for block, record in zip(blocks, records):
        norm = block.ln_2 if family == "gpt2" else block.post_attention_layernorm
        codes = block._encode(record["a"])
        student_out = record["h"] + block._student_mlp(norm(record["h"]), codes)
        delta_norm = block._squared_norms(codes).mean()
        losses.append(torch.nn.functional.mse_loss(student_out, record["out"]) + 0.03 * delta_norm)
    torch.stack(losses).mean().backward()
    recorded = gradients(blocks)

    size = recorded.abs().max().item()
    assert size > 0
    torch.testing.assert_close(now, later, rtol=1e-12, atol=1e-14 * size)
    torch.testing.assert_close(now, recorded, rtol=1e-9, atol=1e-12 * size)
    metrics = read_metrics(model)
    actual = metrics.loss + 0.03 * metrics.delta_norm
    torch.testing.assert_close(actual, torch.stack(losses).detach(), rtol=1e-12, atol=0.0)


def test_the_teacher_stream_is_the_original_model():
    """Logits of local mode equal the untouched model's, bit for bit; in the student stream those of `npt`."""
    model = tiny("qwen2")
    with torch.no_grad():
        original = model(token_ids()).logits
        excite(convert(model, NPT))
        student = model(token_ids()).logits
        for stream, expected in (("teacher", original), ("student", student)):
            set_mode(model, "local", stream=stream, backward="never")
            assert torch.equal(expected, model(token_ids()).logits)


def test_streams_differ_in_what_later_blocks_see():
    """Both streams give the first converted block the same loss and the second one another."""
    model = tiny()
    excite(convert(model, NPT))
    losses = {}
    for stream in ("teacher", "student"):
        set_mode(model, "local", stream=stream, backward="never")
        model(token_ids())
        losses[stream] = read_metrics(model).loss
    assert losses["teacher"][0] == losses["student"][0]
    assert losses["teacher"][1] != losses["student"][1]


def test_metrics_mean_what_they_say():
    """With B = 0 the branch is MLP(LN2(h)): loss and relative error by hand, delta_norm 0; no graph held."""
    model = tiny()
    block = convert(model, Npt(layers=(1,), rank=5))[0]
    seen = {}
    block.self_attn.register_forward_hook(lambda *call: seen.update(a=call[-1][0]))
    block.register_forward_hook(lambda _, args, out: seen.update(h=args[0], out=out))
    set_mode(model, "local")
    with pytest.raises(RunError, match="measured nothing"):
        read_metrics(model)
    model(token_ids())
    metrics = read_metrics(model)
    target = seen["out"] - seen["h"]
    error = block.mlp(block.post_attention_layernorm(seen["h"])) - target
    assert (1,) == metrics.layers
    torch.testing.assert_close(metrics.loss, error.square().mean()[None])
    torch.testing.assert_close(metrics.relative_error, error.square().mean()[None] / target.square().mean())
    assert 0.0 == metrics.delta_norm.item()
    for value in (block.npt_metrics.loss, block.npt_metrics.target_mean_square, block.npt_metrics.delta_norm):
        assert (4, False) == (value.untyped_storage().nbytes(), value.requires_grad)
    assert block.npt_loss is None


def test_loss_scale_and_regularization_scale_gradients():
    """`loss_scale` multiplies the gradients; without regularization they are others; `never` leaves none."""
    gradient = {}
    for regularization in (0.0, 0.03):
        model = tiny()
        blocks = convert(model, Npt(layers="all", rank=5, regularization=regularization))
        excite(blocks)
        gradient[regularization] = local_step(model, blocks)
    torch.testing.assert_close(local_step(model, blocks, loss_scale=1024.0), 1024.0 * gradient[0.03])
    tensor_scale = torch.tensor(0.25)
    torch.testing.assert_close(local_step(model, blocks, loss_scale=tensor_scale), 0.25 * gradient[0.03])
    assert not torch.allclose(gradient[0.0], gradient[0.03], rtol=0.01)
    model.zero_grad()
    set_mode(model, "local", backward="never")
    with torch.inference_mode():
        model(token_ids())
    assert all(block.np.A.grad is None for block in blocks)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_neither_loss_nor_gradients(family, side):
    """A batch of 11 and 7 tokens, padded: the loss is the mean over 18 tokens, whatever the padding holds."""
    model = tiny(family)
    blocks = convert(model, NPT)
    excite(blocks)
    ids = token_ids()
    lengths = (11, 7)
    expected = torch.zeros(len(blocks), 3)
    expected_gradients = torch.zeros_like(local_step(model, blocks, ids))
    for row, length in enumerate(lengths):
        set_mode(model, "local")
        expected_gradients += local_step(model, blocks, ids[row : row + 1, :length]) * length / 18
        metrics = read_metrics(model)
        target = metrics.loss / metrics.relative_error
        expected += torch.stack([metrics.loss, target, metrics.delta_norm], 1) * length / 18

    for padding_id in (0, 40):
        padded = torch.full((2, 11), padding_id)
        mask = torch.zeros(2, 11, dtype=torch.long)
        for row, length in enumerate(lengths):
            columns = slice(0, length) if side == "right" else slice(11 - length, 11)
            padded[row, columns] = ids[row, :length]
            mask[row, columns] = 1
        model.zero_grad()
        set_mode(model, "local", token_mask=mask)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        with torch.no_grad():
            model(padded, attention_mask=mask, position_ids=positions)
        metrics = read_metrics(model)
        actual = torch.stack([metrics.loss, metrics.loss / metrics.relative_error, metrics.delta_norm], 1)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
        size = expected_gradients.abs().max().item()
        torch.testing.assert_close(gradients(blocks), expected_gradients, rtol=1e-3, atol=1e-5 * size)


def test_a_mask_holds_until_the_next_call():
    """`set_mode` without a mask counts every token again, and without a scale scales by one."""
    model = tiny()
    blocks = convert(model, NPT)
    excite(blocks)
    expected = local_step(model, blocks)
    mask = torch.ones(2, 11)
    mask[0, 3:] = 0
    assert not torch.allclose(expected, local_step(model, blocks, token_mask=mask, loss_scale=8.0))
    assert torch.equal(expected, local_step(model, blocks))


def test_a_mask_of_another_batch_is_an_error():
    """A mask left from a batch of another shape is named with both shapes."""
    model = tiny()
    convert(model, NPT)
    set_mode(model, "local", token_mask=torch.ones(2, 9))
    with pytest.raises(RunError, match=r"\(2, 9\).*\(2, 11\)"):
        model(token_ids())


def test_a_batch_of_padding_alone_has_no_loss():
    """No token that counts: zero loss and gradients, not a division by zero."""
    model = tiny()
    blocks = convert(model, NPT)
    excite(blocks)
    actual = local_step(model, blocks, token_mask=torch.zeros(2, 11))
    assert torch.equal(torch.zeros_like(actual), actual)


def test_dropout_in_the_teacher_is_an_error():
    """GPT-2's default dropout in training mode would make the target noise; in eval mode all is well."""
    model = tiny("gpt2").train()
    convert(model, NPT)
    with pytest.raises(RunError, match=r"dropout 0\.1"):
        set_mode(model, "local")
    set_mode(model.eval(), "local")
    model = tiny("llama", attention_dropout=0.2).train()
    convert(model, NPT)
    with pytest.raises(RunError, match=r"dropout 0\.2"):
        set_mode(model, "local")


@pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing_enable. is deprecated", "ignore:None of the inputs"
)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_does_not_touch_local_training(use_reentrant):
    """With checkpointing on, gradients are the same, and blocks run once."""
    model = tiny().train()
    blocks = convert(model, NPT)
    excite(blocks)
    expected = local_step(model, blocks)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    assert torch.equal(expected, local_step(model, blocks))
    calls = []
    blocks[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    model.zero_grad()
    model(token_ids())
    assert torch.equal(expected, gradients(blocks))
    assert 2 == len(calls), "one teacher and one student"
    set_mode(model, "npt")
    assert blocks[0].gradient_checkpointing


def test_only_one_block_has_a_graph_at_a_time():
    """Peak memory of eight converted blocks exceeds that of two by the gradients of six alone."""
    peaks = {}
    for num_layers in (2, 8):
        model = tiny(num_layers=num_layers, intermediate_size=112)
        convert(model, Npt(layers="all", rank=2))
        for backward in ("now", "later"):
            set_mode(model, "local", backward=backward)
            model.zero_grad()
            known = [*model.parameters(), *model.buffers()]
            with torch.set_grad_enabled(backward == "later"), LiveStorages(known) as storages:
                model.model(token_ids(2, 48), use_cache=False)
                if backward == "later":
                    local_loss(model).backward()
            peaks[num_layers, backward] = storages.peak_bytes
    gradient_bytes = 2 * (32 + 112) * 4
    scalar_bytes = 64
    growth = {how: peaks[8, how] - peaks[2, how] for how in ("now", "later")}
    assert 0 <= growth["now"] <= 6 * (gradient_bytes + scalar_bytes)
    assert growth["later"] > 6 * 2 * 48 * 112 * 2 * 4, "the tracker sees graphs that stay"


def test_peak_memory_of_a_gated_block():
    """Four N f (pre, act, up, product), four N d (a, x, target, out) and small ones, as its module lists."""
    d, f, r, num_tokens = 32, 448, 2, 96
    model = tiny(num_layers=1, intermediate_size=f)
    block = convert(model, Npt(layers="all", rank=r))[0]
    set_mode(model, "local")
    h = torch.randn(2, num_tokens // 2, d)
    rotary = model.model.rotary_emb(h, torch.arange(num_tokens // 2)[None])
    with torch.no_grad(), LiveStorages([h, *rotary, *model.parameters()]) as storages:
        block(h, position_embeddings=rotary)
    large = num_tokens * (4 * f + 4 * d) * 4
    small = (8 * num_tokens * r + 8 * r * r + 4 * num_tokens) * 4
    assert large <= storages.peak_bytes <= large + small


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_sixteen_bit_bases_train_float32_parameters(family, dtype):
    """Gradients are float32, finite, and point where those of the float32 base point, loss scale included."""
    reference = tiny(family)
    reference_blocks = convert(reference, NPT, seed=7)
    excite(reference_blocks)
    expected = local_step(reference, reference_blocks)
    model = tiny(family).to(dtype)
    blocks = convert(model, NPT, seed=7)
    excite(blocks)
    scale = 2.0**10 if dtype == torch.float16 else 1.0
    actual = local_step(model, blocks, loss_scale=scale) / scale
    assert {torch.float32} == {block.np.A.dtype for block in blocks} | {actual.dtype}
    assert torch.isfinite(actual).all()
    assert torch.nn.functional.cosine_similarity(actual, expected, dim=0) > 0.99
    torch.testing.assert_close(
        read_metrics(model).relative_error, read_metrics(reference).relative_error, rtol=0.05, atol=0.0
    )
    set_mode(model, "npt")
    assert dtype == model(token_ids()).logits.dtype
    model(token_ids(), labels=token_ids()).loss.backward()


def test_float16_training_does_not_overflow_where_squares_would():
    """Branches of size 1000: float16 squares would be infinite, the loss and the gradients are not."""
    gradient, loss = {}, {}
    for dtype in (torch.float32, torch.float16):
        model = tiny("gpt2")
        with torch.no_grad():
            model.transformer.h[2].mlp.c_proj.weight.mul_(1000.0)
        blocks = convert(model.to(dtype), Npt(layers=(2,), rank=5))
        excite(blocks)
        gradient[dtype] = local_step(model, blocks)
        loss[dtype] = read_metrics(model).loss.item()
    assert loss[torch.float32] > 1e5
    assert loss[torch.float32] == pytest.approx(loss[torch.float16], rel=0.01)
    assert torch.nn.functional.cosine_similarity(*gradient.values(), dim=0) > 0.99


def test_local_training_under_autocast():
    """A float32 base under bfloat16 autocast: backward runs outside it and gives float32 gradients."""
    model = tiny("llama")
    blocks = convert(model, NPT)
    excite(blocks)
    expected = local_step(model, blocks)
    in_autocast = []
    blocks[0].np.A.register_hook(lambda grad: in_autocast.append(torch.is_autocast_enabled("cpu")))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = local_step(model, blocks)
    assert [False] == in_autocast
    assert torch.float32 == actual.dtype
    assert torch.nn.functional.cosine_similarity(actual, expected, dim=0) > 0.99
    set_mode(model, "npt")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(token_ids(), labels=token_ids()).loss.backward()


def test_frozen_blocks_measure_but_do_not_train():
    """Training one layer at a time: a block whose A and B are frozen runs without a backward pass."""
    model = tiny()
    first, second = convert(model, NPT)
    first.np.requires_grad_(False)
    set_mode(model, "local")
    model(token_ids())
    assert first.np.A.grad is None
    assert second.np.A.grad is not None
    assert (2,) == tuple(read_metrics(model).loss.shape)


@pytest.mark.parametrize(
    ("family", "variant"),
    [("llama", "diag"), ("gpt2", "diag"), ("gpt2", "outer sum"), ("llama", "gate and up")],
)
def test_the_loss_on_a_fixed_batch_falls_tenfold(family, variant):
    """300 steps on 16 tokens, a base whose attention matters: the loss ends below a tenth of its start."""
    model = tiny(family, hidden_size=64, intermediate_size=192, num_layers=2, initializer_range=0.1)
    npt = Npt(layers="upper_half", rank=16, regularization=0.0, **VARIANTS[variant])
    blocks = convert(model, npt, seed=0)
    parameters = list(itertools.chain.from_iterable(block.np.parameters() for block in blocks))
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    ids = token_ids(1, 16)
    losses = []
    for _ in range(300):
        local_step(model, blocks, ids)
        optimizer.step()
        schedule.step()
        losses.append(read_metrics(model).loss.mean().item())
    assert losses[0] / losses[-1] > 10.0
    with torch.no_grad():
        set_mode(model, "base")
        base = model(ids).logits
        set_mode(model, "npt")
        trained = (model(ids).logits - base).square().mean()
        for parameter in parameters:
            parameter.zero_()
        untrained = (model(ids).logits - base).square().mean()
    assert trained < 0.1 * untrained, "blocks that are equal one by one make a model that is"
