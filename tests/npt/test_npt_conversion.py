"""Conversion: what becomes trainable, what is refused, and the wrappers, hooks and bases it works with."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from npt_models import FAMILIES, excite, gradients, tiny, token_ids  # noqa: E402

from memplan.errors import JobError, ModelError, RunError, UnknownModel  # noqa: E402
from memplan.job.spec import Npt  # noqa: E402
from memplan.npt import convert, local_loss, npt_blocks, read_metrics, set_mode  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_npt_tensors_are_trainable(family):
    """Two parameters per chosen block, r * (d + f) elements; names of the base's parameters stay."""
    model = tiny(family)
    names = {name for name, _ in model.named_parameters()}
    blocks = convert(model, Npt(layers="upper_half", rank=5))
    trainable = {name: tuple(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    stem = "transformer.h" if family == "gpt2" else "model.layers"
    assert trainable == {
        f"{stem}.{layer}.np.{name}": shape
        for layer in (2, 3)
        for name, shape in (("A", (32, 5)), ("B", (5, 48)))
    }
    assert names == {name for name, _ in model.named_parameters()} - trainable.keys()
    assert [2, 3] == [block.npt_layer for block in blocks]
    assert blocks == npt_blocks(model)


def test_the_sizes_are_those_of_the_layers():
    """Without `n_inner`, GPT-2's inner width is 4 d; it is read from the layer, not from the config."""
    block = convert(tiny("gpt2", intermediate_size=None), Npt(layers=(0,), rank=5))[0]
    assert (5, 128) == tuple(block.np.B.shape)


def test_parameters_take_the_dtype_and_seed_asked_for():
    """float32 on a bfloat16 base unless told otherwise; a seed gives the same A on any base dtype."""
    first = convert(tiny().bfloat16(), Npt(layers="all", rank=5), seed=3)
    second = convert(tiny(), Npt(layers="all", rank=5), dtype=torch.bfloat16, seed=3)
    assert (torch.float32, torch.bfloat16) == (first[0].np.A.dtype, second[0].np.A.dtype)
    assert torch.equal(first[1].np.A.bfloat16(), second[1].np.A)
    assert not torch.equal(first[0].np.A, first[1].np.A)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_on_meta_can_be_converted_and_traced(family):
    """A model without memory takes a local step: parameters, gradients and masks are where the base is."""
    with torch.device("meta"):
        model = tiny(family)
    block = convert(model, Npt(layers="all", rank=5), seed=0)[0]
    assert ("meta", "meta") == (block.np.A.device.type, block.np.B.device.type)
    set_mode(model, "local", token_mask=torch.ones(2, 11))
    with torch.no_grad():
        model(token_ids().to("meta"))
    assert ("meta", (32, 5)) == (block.np.A.grad.device.type, tuple(block.np.A.grad.shape))


def test_blocks_of_other_formulas_are_unknown_models():
    """Granite's blocks have the submodules of Llama's, but scale their residuals: it would be wrong."""
    config = transformers.GraniteConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model = transformers.GraniteForCausalLM(config)
    assert hasattr(model.model.layers[0].mlp, "gate_proj")
    with pytest.raises(UnknownModel, match="GraniteForCausalLM") as caught:
        convert(model, Npt())
    assert "LlamaDecoderLayer" in caught.value.hint


def test_a_second_conversion_and_bad_layers_are_errors():
    """A model is converted once; a refused choice of layers leaves it as it was."""
    model = tiny()
    with pytest.raises(JobError, match="block 4"):
        convert(model, Npt(layers=(4,)))
    assert all(parameter.requires_grad for parameter in model.parameters())
    convert(model, Npt(layers=(0,)))
    with pytest.raises(ModelError, match="NPT blocks already"):
        convert(model, Npt(layers=(1,)))


def test_gpt2_has_one_input_matrix():
    """`target: gate_up` needs a gated MLP; the model stays as it was."""
    model = tiny("gpt2")
    with pytest.raises(JobError, match="one input matrix"):
        convert(model, Npt(target="gate_up"))
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_cross_attention_is_refused():
    """A GPT-2 block with cross-attention has a third branch, which the formula does not know."""
    with pytest.raises(ModelError, match="cross-attention"):
        convert(tiny("gpt2", add_cross_attention=True), Npt(layers="all"))


def test_an_unconverted_model_says_so():
    """Modes and metrics need NPT blocks, a summed loss needs backward=later, modes are checked."""
    model = tiny()
    for call in (lambda: set_mode(model, "npt"), lambda: read_metrics(model), lambda: local_loss(model)):
        with pytest.raises(RunError, match="has no NPT blocks"):
            call()
    convert(model, Npt())
    with pytest.raises(RunError, match="hold no loss"):
        local_loss(model)
    with pytest.raises(ValueError, match="mode must be one of npt, base, local, not 'train'"):
        set_mode(model, "train")


def test_a_replaced_forward_is_refused():
    """A forward set on the instance would hide the class's, and the block would never be an NPT block."""
    model = tiny()
    model.model.layers[1].forward = lambda hidden_states, **_: hidden_states
    with pytest.raises(ModelError, match="block 1"):
        convert(model, Npt(layers="all"))


@pytest.mark.parametrize("hooks_first", [True, False])
def test_accelerate_hooks_work_before_and_after_conversion(hooks_first):
    """Hooks replace the forward of each block; the NPT formula runs nevertheless, once, without recursion."""
    hooks = pytest.importorskip("accelerate.hooks")
    plain = tiny()
    excite(convert(plain, Npt(layers="all", rank=5)))
    with torch.no_grad():
        expected = plain(token_ids()).logits
    model = tiny()
    calls = []

    class Counting(hooks.ModelHook):
        def pre_forward(self, module, *args, **kwargs):
            calls.append(1)
            return args, kwargs

    def add_hooks():
        for layer in model.model.layers:
            hooks.add_hook_to_module(layer, Counting())

    if hooks_first:
        add_hooks()
    excite(convert(model, Npt(layers="all", rank=5)))
    if not hooks_first:
        add_hooks()
    with torch.no_grad():
        assert torch.equal(expected, model(token_ids()).logits)
    assert 4 == len(calls)
    for layer in model.model.layers:
        hooks.remove_hook_from_module(layer)
    with torch.no_grad():
        assert torch.equal(expected, model(token_ids()).logits)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_prepared_model_trains_in_every_mode(precision):
    """`Accelerator.prepare` replaces the model's forward; modes, metrics and gradients pass through it."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    model = tiny()
    blocks = convert(model, Npt(layers="all", rank=5))
    excite(blocks)
    prepared = accelerator.prepare(model)
    for mode in ("base", "npt", "local"):
        set_mode(prepared, mode)
        assert torch.isfinite(prepared(token_ids()).logits).all()
    assert gradients(blocks).abs().max() > 0
    assert (4,) == tuple(read_metrics(prepared).loss.shape)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_wrapped_model_can_be_converted():
    """Blocks are found through wrappers such as DDP's, which hold the model as a submodule."""
    model = torch.nn.ModuleDict({"module": tiny("gpt2")})
    assert 2 == len(convert(model, Npt()))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
def test_adapters_on_the_base_are_respected():
    """LoRA on the MLP's first matrix changes the NPT block too: the layer is called, not its weight used."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny(), config).eval()
    blocks = convert(model, Npt(layers="all", rank=5))
    excite(blocks)
    with torch.no_grad():
        adapted = model(token_ids()).logits
        with model.disable_adapter():
            assert not torch.allclose(adapted, model(token_ids()).logits, atol=0.1)
    set_mode(model, "local")
    model(token_ids())
    assert gradients(blocks).abs().max() > 0


def test_a_4bit_base_trains(tmp_path):
    """NF4 weights have another shape than their layer; all is as on the dequantised base."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    tiny(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    quantization = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=quantization
    ).eval()
    dequantised = tiny(hidden_size=64, intermediate_size=128)
    for name, layer in model.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            # Some CPUs would repack the weights in eval mode into a layout that has no backward.
            layer.support_avx512bf16_for_cpu = False
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            dequantised.get_submodule(name).weight.data.copy_(weight)
    relative_errors, all_gradients = [], []
    for base in (model, dequantised):
        blocks = convert(base, Npt(layers="all", rank=5))
        excite(blocks, std=0.1)
        set_mode(base, "local")
        with torch.no_grad():
            base(token_ids())
        relative_errors.append(read_metrics(base).relative_error)
        all_gradients.append(gradients(blocks))
    assert isinstance(model.model.layers[0].mlp.gate_proj, bitsandbytes.nn.Linear4bit)
    torch.testing.assert_close(*relative_errors, rtol=1e-3, atol=0.0)
    size = all_gradients[1].abs().max().item()
    torch.testing.assert_close(*all_gradients, rtol=1e-2, atol=1e-3 * size)
