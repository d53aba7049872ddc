"""The model that trains: what is frozen, in which dtype, what is recomputed; and what a step does."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

from tiny_runs import GPT2, LLAMA  # noqa: E402

from memplan.errors import JobError, RunError, UnknownModel  # noqa: E402
from memplan.job.spec import Job, Lora, Npt, Train  # noqa: E402
from memplan.job.targets import is_pattern  # noqa: E402
from memplan.model import architecture_from_config  # noqa: E402
from memplan.tape.writer import write_tape  # noqa: E402
from memplan.train.build import Built, build_model  # noqa: E402
from memplan.train.data import Batches  # noqa: E402
from memplan.train.group import ALONE  # noqa: E402
from memplan.train.loop import Loop, seed_micro_batch  # noqa: E402
from memplan.train.optimizer import build_optimizer, learning_rate  # noqa: E402
from memplan.train.samples import START, Samples, SampleWriter  # noqa: E402
from memplan.train.training_state import base_fingerprint  # noqa: E402

pytestmark = pytest.mark.torch

CPU = torch.device("cpu")
PLAIN_GPT2 = GPT2 | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def _job(method: str = "lora", **changes: Any) -> Job:
    job = Job(model="?", weights="random", method=method, dtype="float32", max_seq_len=16)
    return job.replace(lora=Lora(rank=4, alpha=8), npt=Npt(layers="all", rank=4)).replace(**changes)


def _build(job: Job, config: dict[str, Any] = LLAMA) -> Built:
    return build_model(job, config, CPU, weights_path=None)


def _samples(*lengths: int) -> Samples:
    generator = torch.Generator().manual_seed(3)
    writer = SampleWriter()
    for length in lengths:
        ids = torch.randint(0, 250, (length,), generator=generator).tolist()
        writer.add(array("i", [ids[0] | START, *ids[1:]]))
    return writer.finish()


def _one_step(job: Job, config: dict[str, Any], samples: Samples) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss of a step, and what it adds to each trained parameter under plain SGD."""
    built = _build(job, config)
    for parameter in built.trainable:  # adapters start with B = 0, which hides half of the gradients
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    names = {name: parameter for name, parameter in built.model.named_parameters() if parameter.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in names.items()}
    batches = Batches(
        samples, job.micro_batch_size, job.gradient_accumulation_steps, seed=0, packing=job.packing
    )
    loop = Loop(job, built, build_optimizer(job, built.trainable), batches, CPU)
    result = loop.step(1)
    return result.loss, {name: parameter.detach() - before[name] for name, parameter in names.items()}


@pytest.mark.parametrize("loss", ["full", "chunked"])
@pytest.mark.parametrize("method", ["lora", "full", "npt"])
def test_accumulation_equals_the_big_batch(method: str, loss: str) -> None:
    """Four micro batches of very unequal lengths move every weight as one batch of four does."""
    samples = _samples(16, 3, 9, 5)
    job = _job(method, loss=loss, optimizer="sgd", train=Train(learning_rate=1.0))
    expected_loss, expected = _one_step(job.replace(micro_batch_size=4), PLAIN_GPT2, samples)

    actual_loss, actual = _one_step(job.replace(gradient_accumulation_steps=4), PLAIN_GPT2, samples)

    assert actual_loss == pytest.approx(expected_loss, rel=1e-5)
    assert any(change.abs().max() > 1e-6 for change in expected.values())
    for name, change in expected.items():
        torch.testing.assert_close(actual[name], change, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"method": "lora"}, "chunked"),
        ({"method": "lora", "lora.target_modules": ("q_proj", "lm_head")}, "full"),
        ({"method": "lora", "loss": "full"}, "full"),
        ({"method": "lora", "loss": "full", "loop": "hf_trainer"}, "full"),
        ({"method": "full"}, "full"),
        ({"method": "full", "loss": "chunked"}, "chunked"),
    ],
)
def test_the_loss_is_chunked_where_the_head_is_frozen_and_bare(fields: dict[str, Any], expected: str) -> None:
    """`loss: auto` in the model that is built, and the same in the plan."""
    job = _job().replace(**fields)

    assert _build(job).loss_form == expected
    architecture = architecture_from_config(LLAMA, name="tiny", source="tests")
    auto, said = (write_tape(each, architecture).flatten() for each in (job, job.replace(loss=expected)))
    assert auto.sizes == said.sizes
    if "loss" not in fields and "lora.target_modules" not in fields:  # which the other form cannot do
        other = {"chunked": "full", "full": "chunked"}[expected]
        assert write_tape(job.replace(loss=other), architecture).flatten().sizes != said.sizes


@pytest.mark.parametrize("config", [LLAMA, PLAIN_GPT2], ids=["llama", "gpt2"])
def test_the_loss_is_that_of_transformers(config: dict[str, Any]) -> None:
    """One batch without padding gives the loss that the model computes by itself."""
    job = _job("full", micro_batch_size=2, optimizer="sgd")
    built = _build(job, config)
    batches = Batches(_samples(7, 7), 2, 1, seed=0)
    input_ids = batches.micro_batch(1, 0).input_ids
    expected = built.model(input_ids=input_ids, labels=input_ids).loss.item()

    actual = Loop(job, built, build_optimizer(job, built.trainable), batches, CPU).step(1).loss

    assert actual == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("method", ["lora", "full", "npt"])
def test_padding_changes_nothing(method: str) -> None:
    """The loss of a short sequence is the same beside a long one as it is alone, though there is no mask."""
    job = _job(method, optimizer="sgd")
    _, alone = _one_step(job.replace(gradient_accumulation_steps=2), LLAMA, _samples(12, 4))
    _, padded = _one_step(job.replace(micro_batch_size=2), LLAMA, _samples(12, 4))

    for name, change in alone.items():
        torch.testing.assert_close(padded[name], change, rtol=1e-3, atol=1e-7, msg=name)


@pytest.mark.parametrize(
    ("method", "trained"), [("lora", "lora_"), ("npt", ".np."), ("full", "")], ids=["lora", "npt", "full"]
)
def test_only_what_the_method_trains_needs_gradients(method: str, trained: str) -> None:
    """Adapters, NPT tensors, or everything; the rest is frozen."""
    built = _build(_job(method))

    for name, parameter in built.model.named_parameters():
        assert parameter.requires_grad == (trained in name), name
    assert built.trainable


def test_adapters_reach_every_linear_layer_but_the_head() -> None:
    """`all-linear` is all seven of each block; names choose among them."""
    adapted = {
        name.split(".lora_A")[0].split(".")[-1]
        for name, _ in _build(_job()).model.named_parameters()
        if ".lora_A" in name
    }
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    some = _build(_job(**{"lora.target_modules": ("q_proj", "lm_head")}))
    names = [name for name, parameter in some.model.named_parameters() if parameter.requires_grad]
    assert {"q_proj" in name or "lm_head" in name for name in names} == {True}
    assert "lora" in type(some.head).__module__


@pytest.mark.parametrize("base", ["bfloat16", "float32"])
@pytest.mark.parametrize("adapter", ["bfloat16", "float32"])
def test_dtypes_are_those_of_the_job(base: str, adapter: str) -> None:
    """Base weights in `dtype`, adapters in `lora.dtype`, whatever the other is."""
    built = _build(_job(dtype=base, **{"lora.dtype": adapter}))

    for name, parameter in built.model.named_parameters():
        expected = adapter if "lora_" in name else base
        assert str(parameter.dtype) == f"torch.{expected}", name


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
def test_random_models_are_those_of_transformers(config: dict[str, Any], dtype: str) -> None:
    """Buffers, ties and dtypes are those of a model that transformers builds, given the same weights."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    built = _build(_job("full", dtype=dtype), config).model.eval()
    resolved = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    plain = AutoModelForCausalLM.from_config(resolved, dtype=getattr(torch, dtype)).eval()
    plain.load_state_dict(built.state_dict())
    ids = torch.tensor([[1, 2, 3, 4]])

    assert torch.equal(built(input_ids=ids).logits, plain(input_ids=ids).logits)
    assert all(
        parameter.std() > 0 for name, parameter in built.named_parameters() if name.endswith("proj.weight")
    )
    for (name, actual), (_, expected) in zip(built.named_buffers(), plain.named_buffers(), strict=True):
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape), name
        assert torch.equal(actual, expected), name


def test_random_weights_depend_on_the_seed_alone() -> None:
    """The same seed draws the same model, whatever was drawn before; another seed another one."""
    first = _build(_job("full"))
    torch.manual_seed(1234)
    again, other = _build(_job("full")), _build(_job("full", **{"train.seed": 1}))

    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    same, also, differs = (_build(_job(**{"train.seed": seed})).model for seed in (0, 0, 1))
    assert base_fingerprint(same, ALONE) == base_fingerprint(also, ALONE) != base_fingerprint(differs, ALONE)


@pytest.mark.parametrize(("setting", "blocks"), [("none", []), ("selective", [1]), ("full", [0, 1, 2])])
def test_which_blocks_are_recomputed(setting: str, blocks: list[int]) -> None:
    """`full` recomputes every block, `selective` every second one beginning with the second."""
    built = _build(_job(activation_checkpointing=setting))

    assert [
        index for index, block in enumerate(built.decoder.layers) if block.gradient_checkpointing
    ] == blocks
    assert not built.decoder.config.use_cache


@pytest.mark.parametrize("config", [LLAMA, GPT2], ids=["llama", "gpt2"])
@pytest.mark.parametrize("setting", ["selective", "full"])
def test_recomputing_gives_the_same_gradients(setting: str, config: dict[str, Any]) -> None:
    """Dropout included: recomputed blocks draw the masks of their forward pass."""
    job = _job(optimizer="sgd", **{"lora.dropout": 0.3})
    expected_loss, expected = _one_step(job, config, _samples(12))

    actual_loss, actual = _one_step(job.replace(activation_checkpointing=setting), config, _samples(12))

    assert actual_loss == expected_loss
    for name, change in expected.items():
        assert torch.equal(actual[name], change), name


def test_frozen_inputs_need_no_gradients() -> None:
    """Checkpointing leaves the embeddings' output without gradient: below the adapters nothing is saved."""
    built = _build(_job(activation_checkpointing="full"))

    assert not built.decoder.embed_tokens(torch.tensor([[1]])).requires_grad


def test_every_micro_batch_has_its_own_random_state() -> None:
    """The generator depends on seed, step and micro batch, and on nothing that was drawn before."""

    def draw(*key: int) -> float:
        seed_micro_batch(*key)
        return torch.rand(()).item()

    keys = [(seed, step, micro) for seed in (0, 1) for step in (1, 2) for micro in (0, 1)]
    draws = [draw(*key) for key in keys]

    assert len(set(draws)) == len(keys)
    assert draws[::-1] == [draw(*key) for key in keys[::-1]]


@pytest.mark.parametrize("kernel", ["foreach", "fused", "loop"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "adafactor"])
def test_kernels_of_an_optimizer_agree(optimizer: str, kernel: str) -> None:
    """The choice of kernel does not change the step."""
    job = _job(optimizer=optimizer, train=Train(learning_rate=0.1, weight_decay=0.1, max_grad_norm=1.0))
    _, expected = _one_step(job.replace(optimizer_kernel="loop"), LLAMA, _samples(12))

    _, actual = _one_step(job.replace(optimizer_kernel=kernel), LLAMA, _samples(12))

    for name, change in expected.items():
        torch.testing.assert_close(actual[name], change, rtol=1e-4, atol=1e-6, msg=name)


def test_autocast_computes_in_its_dtype() -> None:
    """Under bfloat16 autocast the loss is close to the float32 one and not the same."""
    job = _job("full", optimizer="sgd")
    exact, _ = _one_step(job, LLAMA, _samples(12))
    for loss in ("full", "chunked"):
        low, _ = _one_step(job.replace(autocast="bfloat16", loss=loss), LLAMA, _samples(12))
        assert low != exact
        assert low == pytest.approx(exact, rel=0.02)


def test_models_whose_logits_are_transformed_are_refused() -> None:
    """A loss on `lm_head(hidden)` alone would be the wrong one for them."""
    with pytest.raises(RunError, match="logits_scaling"):
        _build(_job("full"), LLAMA | {"logits_scaling": 8.0})


def test_chunks_need_a_plain_head() -> None:
    """An adapter on the head is refused with the chunked loss, which knows the head's weight alone."""
    job = _job(loss="chunked", **{"lora.target_modules": ("lm_head",)})

    with pytest.raises(RunError, match="output head"):
        _build(job)


def test_unknown_names_are_explained() -> None:
    """A model type that transformers does not know."""
    with pytest.raises(UnknownModel, match="no model type `nope`"):
        _build(_job(), {"model_type": "nope"})


def test_learning_rate_warms_up_and_falls() -> None:
    """Warm-up ends at the peak; linear and cosine reach zero one step after the last."""
    constant = Train(learning_rate=2.0, warmup_steps=4, max_steps=10)
    assert [learning_rate(constant, step) for step in (1, 4, 5, 10)] == [0.5, 2.0, 2.0, 2.0]
    for schedule in ("linear", "cosine"):
        falling = Train(learning_rate=2.0, warmup_steps=2, max_steps=10, schedule=schedule)
        rates = [learning_rate(falling, step) for step in range(3, 12)]
        assert rates[0] == 2.0
        assert rates == sorted(rates, reverse=True)
        assert rates[-1] == pytest.approx(0.0, abs=1e-12)
        assert rates[4] == pytest.approx(1.0)


def test_a_warmup_may_be_a_share_and_a_schedule_end_above_zero() -> None:
    """A tenth of 25 steps is three, rounded up; linear and cosine end at the smallest learning rate."""
    for schedule in ("linear", "cosine"):
        train = Train(
            learning_rate=2.0, min_learning_rate=0.5, warmup_ratio=0.1, max_steps=25, schedule=schedule
        )
        assert [learning_rate(train, step) for step in (1, 3, 4)] == [pytest.approx(2 / 3), 2.0, 2.0]
        assert learning_rate(train, 15) == pytest.approx(1.25)
        assert learning_rate(train, 26) == pytest.approx(0.5)


def test_vectors_are_not_decayed() -> None:
    """With weight decay and no gradient, matrices shrink by learning rate times decay and vectors stay."""
    matrix, vector = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(_job(train=Train(learning_rate=0.1, weight_decay=0.5)), [vector, matrix])
    matrix.grad, vector.grad = torch.zeros(2, 3), torch.zeros(3)

    optimizer.step()

    torch.testing.assert_close(matrix.data, torch.full((2, 3), 0.95))
    torch.testing.assert_close(vector.data, torch.ones(3))
    (plain,) = build_optimizer(_job(), [vector, matrix]).param_groups
    assert plain["weight_decay"] == 0


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("config", [LLAMA, PLAIN_GPT2])
def test_packed_documents_do_not_see_each_other(config: dict[str, Any], attention: str) -> None:
    """Two documents in one row give the loss and the step of the same two in rows of their own."""
    rows = _samples(7, 9)
    packed, apart = SampleWriter(), SampleWriter()
    packed.add(array("i", [*rows[0], *rows[1]]))
    for index in range(2):
        apart.add(array("i", rows[index]))
    job = _job("full", attention=attention, optimizer="sgd")

    expected, expected_changes = _one_step(job.replace(micro_batch_size=2), config, apart.finish())
    loss, changes = _one_step(job.replace(packing=True), config, packed.finish())

    assert loss == pytest.approx(expected, rel=1e-5)
    for name, change in expected_changes.items():
        torch.testing.assert_close(changes[name], change, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("q_pro", "`q_pro`, which no layer of the model is called", "did you mean `q_proj`?"),
        (
            r".*\.q_pro",
            "which matches no layer of",
            "a whole name, such as `model.layers.0.self_attn.q_proj`",
        ),
    ],
)
def test_adapters_on_nothing_are_refused_with_the_names_there_are(name: str, message: str, hint: str) -> None:
    """What peft does not find is the job's fault, and the model's own names are the remedy."""
    targets = name if is_pattern(name) else (name,)
    with pytest.raises(JobError, match=message) as refused:
        _build(_job(**{"lora.target_modules": targets}))

    assert hint in (refused.value.hint or "")
