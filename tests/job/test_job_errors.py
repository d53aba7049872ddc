"""Bad jobs: every one is a JobError that names the place, the field and the remedy."""

from pathlib import Path

import pytest

from memplan.errors import JobError
from memplan.job.load import load_job


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


def error_of(content: str | bytes, *overrides: str, name: str = "job.yaml", **flags: object) -> JobError:
    data = content if isinstance(content, bytes) else content.encode()
    Path(name).write_bytes(data)
    with pytest.raises(JobError) as caught:
        load_job(name, overrides, flags=flags)
    return caught.value


BAD_LINES = [
    # unknown fields
    ("per_device_batch_size: 2", "unknown field `per_device_batch_size`", "did you mean `micro_batch_size`?"),
    ("micro_batch: 2", "unknown field `micro_batch`", "`micro_batch_size`"),
    ("dtpye: float32", "unknown field `dtpye`", "did you mean `dtype`?"),
    ("rank: 8", "unknown field `rank`", "did you mean `lora.rank` or `npt.rank`?"),
    ("lora: {rnak: 8}", "unknown field `lora.rnak`", "did you mean `lora.rank`?"),
    ("lora: {micro_batch_size: 8}", "unknown field `lora.micro_batch_size`", "`micro_batch_size`"),
    ("lora: {zzz: 8}", "unknown field `lora.zzz`", "its fields are rank, alpha, dropout, target_modules, dtype"),
    ("paralel: {dp_shard: 2}", "unknown field `paralel`", "did you mean `parallel`?"),
    ("qwertyuiop: 1", "unknown field `qwertyuiop`", "`memplan schema` lists every field"),
    ("batch_size: 8", "unknown field `batch_size`", "set `micro_batch_size`"),
    ("num_train_epochs: 3\nmax_steps: 7", "both say how long the run is", "leave one of them out"),
    (
        "load_in_8bit: true\nparallel: {strategy: FULL_SHARD, dp_shard: 2}",
        "an 8-bit base (`quantization.type: int8`) is not sharded, which `parallel.strategy: FULL_SHARD` asks for",
        "set `quantization.type: nf4`",
    ),
    (
        "load_in_8bit: true\nparallel: {strategy: ZERO_3, dp_shard: 2}\nloop: hf_trainer",
        "is not sharded, which `parallel.strategy: ZERO_3` asks for",
        "`parallel.strategy: NO_SHARD` with `parallel.dp_replicate`",
    ),
    (
        "use_reentrant: true\nactivation_checkpointing: selective\nloop: script",
        "`use_reentrant` is not planned with `activation_checkpointing: selective`",
        "leave `use_reentrant` out",
    ),
    ("load_in_8bit: true\noffload: {params: true}", "which `offload.params` asks for", "`quantization.type: nf4`"),
    (
        "quantization: {type: int8}\nmethod: npt\nnpt: {quantized_base: true}",
        "on a base in 4 or 16 bits, not in 8",
        "`quantization.type: nf4`",
    ),
    ("fsdp: {strategy: full}", "unknown field `fsdp`", "`parallel.strategy`"),
    ("dataset: {a: {b: {c: {d: {e: {f: 1}}}}}}", "unknown field `dataset`", "`data.train`"),
    ("<<: {micro_batch_size: 2}", "unknown field `<<`", "write the fields out"),
    ("lora: {rank: {x: 1}}", "`lora.rank` must be a whole number, not a mapping", "`lora.rank: 16`"),
    ("lora.rank.x: 1", "unknown field `lora.rank.x`", "`lora.rank`"),
    ("? [a, b]\n: 1", "unknown field `?`", "remove it"),
    ("trainable_token_indices: [1]", "unknown field `trainable_token_indices`", "`data.special_tokens`"),
    ("modules_to_save: [lm_head, lm_head]", "names `lm_head` twice", "name each module once"),
    ("lora_modules_to_save: [lm_head]\nparallel: {strategy: ZERO_3, dp_shard: 2}", "is not planned with", "FSDP2"),
    # tokens that are added
    ("tokens: [<a>, <a>]", "`data.special_tokens` names `<a>` twice", "name each token once"),
    ("add_tokens: '<a>,<b>'\nmethod: npt", "trains no embeddings", "set `method: lora` or `full`"),
    ("lora_target: [q_proj, lm_head]\ntokens: [<a>]", "`lm_head` cannot have an adapter", "lora.train_tokens"),
    ("quantization: {skip: [x]}\nmethod: qlora\ntokens: [<a>]", "in a quantised head", "`quantization.skip`"),
    # values of the wrong kind
    ("micro_batch_size: two", "`micro_batch_size` must be a whole number, not `two`", "e.g. `micro_batch_size: 1`"),
    ("micro_batch_size: 1.5", "must be a whole number, not `1.5`", "e.g. `micro_batch_size: 1`"),
    ("micro_batch_size: true", "must be a whole number, not `true`", "micro_batch_size: 1"),
    ("micro_batch_size: [1]", "must be a whole number, not the list `[1]`", "micro_batch_size: 1"),
    ("micro_batch_size: 1e400", "must be a whole number, not `1e400`", "micro_batch_size: 1"),
    ("micro_batch_size:", "`micro_batch_size` is empty", "e.g. `micro_batch_size: 1`, the default"),
    ("gpu: ''", "`gpu` is empty", "leave `gpu` out"),
    ("learning_rate: fast", "`learning_rate` must be a number, not `fast`", "0.0001"),
    ("learning_rate: .nan", "must be a number, not `.nan`", "train.learning_rate: 0.0001"),
    ("learning_rate: inf", "must be a number, not `inf`", "train.learning_rate: 0.0001"),
    ("packing: 1", "`packing` must be `true` or `false`, not `1`", "e.g. `packing: false`"),
    ("packing: maybe", "must be `true` or `false`, not `maybe`", "e.g. `packing: false`"),
    ("lora: true", "`lora` is a group of fields, not `true`", "write `lora: {rank: ...}`"),
    ("data: train.jsonl", "`data` is a group of fields, not `train.jsonl`", "write `data: {train: ...}`"),
    ("npt: {layers: middle}", "`npt.layers` must be `all`, `upper_half` or `lower_half` or a list", "upper_half"),
    ("npt: {layers: [1, x]}", "or a list of whole numbers, not `[1, x]`", "upper_half"),
    ("npt: {layers: [[1]]}", "or a list of whole numbers, not `[[1]]`", "upper_half"),
    ("npt: {layers: [all]}", "mixes a word for many into a list", "write `all`, `upper_half` or `lower_half` alone"),
    ("lora: {target_modules: [null]}", "or a list of names, not `[null]`", "all-linear"),
    ("lora: {target_modules: '.*(q_proj'}", "a pattern that Python's `re` cannot read", "a list of names"),
    ("lora: {target_modules: 'q_proj,'}", "`lora.target_modules` has an empty name", "comma"),
    # choices
    ("method: dora", "`method` cannot be `dora`", "choose `full`, `lora`, `qlora` or `npt`"),
    ("method: QLoRA", "`method` cannot be `QLoRA`", "did you mean `qlora`?"),
    ("dtype: fp8", "`dtype` cannot be `fp8`", "choose `float32`, `bfloat16` or `float16`"),
    ("torch_dtype: auto", "`torch_dtype` cannot be `auto`", "choose `float32`, `bfloat16` or `float16`"),
    ("autocast: float32", "`autocast` cannot be `float32`", "choose `bfloat16` or `float16` or null"),
    ("optim: adamw_anyprecision", "`optim` cannot be `adamw_anyprecision`", "choose `adamw`"),
    ("optim: adamw_torch_8bit", "is torchao's, which memplan's own loop does not run", "set `loop: hf_trainer`"),
    ("attention: flash_attention_3", "`attention` cannot be `flash_attention_3`", "did you mean `flash_attention_2`?"),
    ("bf16: auto", "`bf16` cannot be `auto`", "write `true` or `false`, or set `autocast`"),
    ("quantization_bit: 3", "`quantization_bit` cannot be `3`", "write `4` or `8`, or set `method`"),
    ("activation_checkpointing: some", "cannot be `some`", "choose `none`, `selective` or `full`"),
    # bounds
    ("micro_batch_size: 0", "`micro_batch_size` is 0 but must be at least 1", "e.g. `micro_batch_size: 1`"),
    ("micro_batch_size: -3", "is -3 but must be at least 1", "micro_batch_size: 1"),
    ("per_device_train_batch_size: 0", "`per_device_train_batch_size` is 0", "micro_batch_size: 1"),
    ("lora: {rank: 0}", "`lora.rank` is 0 but must be at least 1", "lora.rank: 16"),
    ("lora: {alpha: 0}", "`lora.alpha` is 0.0 but must be above 0", "lora.alpha: 32"),
    ("lora: {dropout: 1}", "`lora.dropout` is 1.0 but must be below 1", "in [0, 1)"),
    ("lora: {dropout: -0.1}", "is -0.1 but must be at least 0", "in [0, 1)"),
    ("learning_rate: 0", "`learning_rate` is 0.0 but must be above 0", "train.learning_rate"),
    ("max_grad_norm: 0", "`max_grad_norm` is 0.0 but must be above 0", "null: no clipping"),
    ("train: {seed: -1}", "`train.seed` is -1 but must be at least 0", "train.seed: 0"),
    ("allocator: {max_split_size_mb: 19}", "is 19 but must be at least 20", "leave `allocator.max_split_size_mb` out"),
    ("allocator: {garbage_collection_threshold: 1}", "is 1.0 but must be below 1", "garbage_collection_threshold"),
    ("allocator: {garbage_collection_threshold: 0}", "is 0.0 but must be above 0", "garbage_collection_threshold"),
    # fields that cannot stand together
    ("allocator: {roundup_power2_divisions: 6}", "is 6, which is no power of two", "use 1, 2, 4, 8 or 16"),
    ("parallel: {tp: 2}", "`parallel.tp` is 2, and tensor parallelism is not supported yet", "`parallel.tp: 1`"),
    ("parallel: {pp: 2}", "pipeline parallelism is not supported yet", "`parallel.pp: 1`"),
    ("parallel: {cp: 2}", "context parallelism is not supported yet", "`parallel.cp: 1`"),
    ("parallel: {ep: 2}", "expert parallelism is not supported yet", "`parallel.ep: 1`"),
    ("parallel: {strategy: FULL_SHARD}", "`FULL_SHARD` has nothing to shard over", "`parallel.dp_shard`"),
    ("parallel: {strategy: ZERO_2}", "`ZERO_2` has nothing to shard over", "`parallel.strategy: NO_SHARD`"),
    ("parallel: {dp_shard: 2}", "`parallel.dp_shard` is 2, but `NO_SHARD`", "`parallel.strategy: FULL_SHARD`"),
    ("parallel: {strategy: HYBRID_SHARD, dp_shard: 2}", "above 1, not 2 and 1", "`parallel.strategy: FULL_SHARD`"),
    ("parallel: {strategy: FULL_SHARD, dp_shard: 2, dp_replicate: 2}", "has no copies", "HYBRID_SHARD"),
    ("npt: {layers: []}", "`npt.layers` is an empty list", "npt: {layers: [16, 17]}"),
    ("npt: {layers: [3, -1]}", "`npt.layers` holds -1, but blocks count from 0", "npt: {layers: [16, 17]}"),
    ("npt: {layers: [3, 4, 3]}", "`npt.layers` names block 3 twice", "npt: {layers: [16, 17]}"),
    ("lora: {target_modules: []}", "`lora.target_modules` is an empty list", "all-linear"),
    ("lora: {target_modules: [q_proj, q_proj]}", "names `q_proj` twice", "all-linear"),
    ("margin: 5", "`margin` is `5`, which is neither a share nor a size", "`margin: 5%`"),
    ("margin: 120%", "`margin` is `120%`", "below 100%"),
    ("margin: lots", "`margin` is `lots`", "`margin: 1GiB`"),
    ("train: {warmup_steps: 2, warmup_ratio: 0.1}", "both say how long the warm-up is", "leave one of them out"),
    ("train: {learning_rate: 1e-4, min_lr: 1e-3}", "0.001 is above `train.learning_rate` 0.0001", "below the peak"),
    ("train: {eval_every: 5}", "`train.eval_every` is set, and there is nothing to evaluate on", "data.eval"),
    ("method: npt\nloop: script", "`method: npt` trains in memplan's own loop", "`loop: memplan`"),
    ("attention: flash_attention_2\ndtype: float32", "no float32 kernels", "`autocast: bfloat16`"),
    # the same field twice
    ("micro_batch_size: 1\nmicro_batch_size: 2", "`micro_batch_size` is given twice, first in line 2", "keep one"),
    ("lora: {rank: 1, rank: 1}", "`lora.rank` is given twice, first in line 2", "keep one"),
    ("lora: {rank: 1}\nlora.rank: 1", "`lora.rank` is given twice, first in line 2", "keep one"),
]  # fmt: skip


@pytest.mark.parametrize(("lines", "message", "hint"), BAD_LINES, ids=[line[0] for line in BAD_LINES])
def test_a_bad_line_is_one_sentence_with_place_and_remedy(lines: str, message: str, hint: str):
    """The error names the file, the line and the field, and says what to do."""
    error = error_of(f"model: gpt2\n{lines}\n")

    assert f"`job.yaml` line {2 + ('twice, first' in message and lines.count(chr(10)))}: " in error.message
    assert message in error.message
    assert hint in (error.hint or "")
    assert "\n" not in error.message


BAD_FILES = [
    ("job.yaml", "", "`job.yaml` is empty", "e.g. `model: gpt2`"),
    ("job.yaml", " \n\n", "`job.yaml` is empty", "e.g. `model: gpt2`"),
    ("job.yaml", "# only a comment\n", "holds nothing but comments", "e.g. `model: gpt2`"),
    ("job.yaml", "- model: gpt2\n", "`job.yaml` holds a list", "`field: value`"),
    ("job.yaml", "gpt2\n", "`job.yaml` holds a single value", "`field: value`"),
    ("job.yaml", "micro_batch_size: 2\n", "`job.yaml`: `model` is missing", "`model: gpt2`"),
    ("job.yaml", "model:\n", "line 1: `model` is empty", "`model: gpt2`"),
    ("job.yaml", "model: [gpt2]\n", "line 1: `model` must be text, not the list `[gpt2]`", "`model: gpt2`"),
    ("job.yaml", "model: gpt2\nlora: {rank: 8\n", "line 3 is not valid YAML: ", "indent with spaces"),
    ("job.yaml", "model: gpt2\n\tlora: 1\n", "line 2 is not valid YAML: ", "indent with spaces"),
    ("job.yaml", "model: a: b\n", "line 1 is not valid YAML: ", "in quotes"),
    ("job.yaml", "model: gpt2\n---\nmodel: gpt2\n", "line 2 is not valid YAML: ", "`field: value`"),
    ("job.yaml", "model: *nobody\n", "line 1 is not valid YAML: ", "in quotes"),
    ("job.yaml", "model: \x07\n", "is not valid YAML: it holds characters that YAML does not allow", "quotes"),
    ("job.yaml", "[" * 200_000, "is not valid YAML: it is nested too deeply", "`field: value`"),
    ("job.yaml", "- " * 10_000, "is not valid YAML: it is nested too deeply", "`field: value`"),
    ("job.yaml", "&a\nmodel: gpt2\nlora: *a\n", "unknown field `lora.model`", "`memplan schema`"),
    ("job.yaml", b"model: gpt2\ngpu: \xff\xfe\n", "`job.yaml` line 2 is not UTF-8 text", "save the file as UTF-8"),
    ("job.json", "{}", "`model` is missing", "`model: gpt2`"),
    ("job.json", "[]", "`job.json` holds a list", "`field: value`"),
    ("job.json", "null", "`job.json` holds nothing", "`model: gpt2`"),
    ("job.json", '{"model": "gpt2",\n}', "`job.json` line 2 is not valid JSON: ", "commas"),
    ("job.json", '{"model": "gpt2", "packing": 1}', "`packing` must be `true` or `false`", "packing: false"),
    ("job.json", '{"model": "gpt2", "micro_batch_size": true}', "a whole number, not `true`", "micro_batch_size: 1"),
    ("job.json", '{"model": true}', "`model` must be text, not `true`", "`model: gpt2`"),
    ("job.json", '{"model": "gpt2", "seed": NaN}', "a whole number, not `nan`", "train.seed: 0"),
    ("job.json", '{"model": "gpt2", "max_seq_len": 1, "max_seq_len": 1}', "`max_seq_len` is given twice", "keep one"),
    ("job.json", "[" * 200_000, "is not valid JSON: it is nested too deeply", "YAML"),
    ("job.toml", "model = gpt2\n", "`job.toml` is not valid TOML: ", "quotes"),
    ("job.toml", 'model = "a"\nmodel = "b"\n', "`job.toml` is not valid TOML: ", "quotes"),
    ("job.toml", 'model = "a"\nmicro_batch_size = 2024-01-01\n', "must be a whole number", "micro_batch_size: 1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "message", "hint"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_a_bad_file_is_one_sentence_with_a_remedy(name: str, content: str | bytes, message: str, hint: str):
    """A file that cannot be a job says why and what to do."""
    error = error_of(content, name=name)

    assert message in error.message
    assert hint in (error.hint or "")


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        (
            "lora.rank",
            "`--set lora.rank`: `lora.rank` is not of the form `field=value`",
            "`--set lora.rank=8`",
        ),
        ("=8", "`--set =8`: `=8` is not of the form `field=value`", "`--set lora.rank=8`"),
        ("lora.rnak=8", "`--set lora.rnak=8`: unknown field `lora.rnak`", "did you mean `lora.rank`?"),
        ("lora.rank=x", "`--set lora.rank=x`: `lora.rank` must be a whole number, not `x`", "lora.rank: 16"),
        ("lora=8", "`--set lora=8`: `lora` is a group of fields, not `8`", "{rank: ...}"),
        ("npt.layers=[1, 2", "`--set npt.layers=[1, 2`: `[1, 2` is not a YAML value", "quotes"),
        ("gpu=@x", "`@x` is not a YAML value", "quotes"),
        ("parallel.tp=2", "`--set parallel.tp=2`: `parallel.tp` is 2", "`parallel.tp: 1`"),
        ("method=null", "`--set method=null`: `method` is empty", "choose `full`"),
    ],
)
def test_a_bad_override_is_quoted(override: str, message: str, hint: str):
    """The error shows the option as it was typed."""
    error = error_of("model: gpt2\n", override)

    assert message in error.message
    assert hint in (error.hint or "")


def test_a_bad_flag_is_named_as_it_is_typed():
    """Flags are named with their dashes."""
    error = error_of("model: gpt2\n", **{"micro_batch_size": "0", "lora.dtype": "int4"})

    assert "`--micro-batch-size`: `micro_batch_size` is 0 but must be at least 1" in error.message
    assert "`--lora-dtype`: `lora.dtype` cannot be `int4`" in error.message


def test_all_problems_are_reported_at_once():
    """One run shows everything that is wrong, each with its place and remedy."""
    error = error_of("micro_batch_size: 0\nrnak: 8\nparallel: {dp_shard: 2}\n", "seed=x")

    assert error.message.splitlines() == [
        "`job.yaml` has 5 problems",
        "  `job.yaml` line 1: `micro_batch_size` is 0 but must be at least 1; e.g. `micro_batch_size: 1`, "
        "the default: Sequences per device in one forward pass",
        "  `job.yaml` line 2: unknown field `rnak`; did you mean `lora.rank` or `npt.rank`?",
        "  `--set seed=x`: `seed` must be a whole number, not `x`; e.g. `train.seed: 0`, "
        "the default: Seed of initialisation, data order and dropout",
        "  `job.yaml`: `model` is missing; add e.g. `model: gpt2`: a hub id, a local folder, or a name from "
        "`memplan models`",
        "  `job.yaml` line 3: `parallel.dp_shard` is 2, but `NO_SHARD` keeps a whole copy on every GPU; set "
        "`parallel.strategy: FULL_SHARD`, or `parallel.dp_replicate: 2` for DDP",
    ]
    assert "`memplan schema`" in (error.hint or "")


def test_a_bad_value_does_not_cause_a_second_problem():
    """Fields that could not be read take no part in the checks between fields."""
    error = error_of("model: gpt2\nparallel: {strategy: FULL_SHARD, dp_shard: two}\n")

    assert "`parallel.dp_shard` must be a whole number, not `two`" in error.message
    assert "problems" not in error.message


@pytest.mark.parametrize(
    ("source", "message", "hint"),
    [
        (
            "npt-lama-8b",
            "there is no job file, ready job or model `npt-lama-8b`",
            "did you mean `npt-llama-8b` or `",
        ),
        (
            "NPT-GPT2",
            "there is no job file, ready job or model `NPT-GPT2`",
            "did you mean `npt-gpt2` or `gpt2`?",
        ),
        (
            "zzzz",
            "there is no job file, ready job or model `zzzz`",
            "`memplan jobs` and `memplan models` list the names",
        ),
        ("jobs/zzzz.yaml", "there is no job file `jobs/zzzz.yaml`", "check the path"),
        ("./lora-fsdp-9k.yaml", "there is no job file `lora-fsdp-9k.yaml`", "did you mean `lora-fsdp-"),
        (
            "~nobody-of-that-name/x.yaml",
            "there is no job file `~nobody-of-that-name/x.yaml`",
            "check the path",
        ),
        ("", "`.` is a folder, not a job file", "`./job.yaml`"),
        ("gpt22", "there is no job file, ready job or model `gpt22`", "did you mean `npt-gpt2` or `gpt2`"),
        ("folder/nothing-7B", "there is no job file `folder/nothing-7B`", "check the path"),
        ("nobody/nothing.yml", "there is no job file `nobody/nothing.yml`", "check the path"),
        ("folder", "`folder` is a folder, not a job file", "`folder/job.yaml`"),
        ("folder.yaml", "`folder.yaml` is a folder, not a job file", "name a file in it"),
        ("big.yaml", "`big.yaml` is larger than a job file can be (1 MiB)", "not the model or the data"),
        ("x" * 5000, "cannot be read: File name too long", "check the path"),
        ("a\0b", "cannot be read", "check the path"),
        ("../npt-gpt2", "there is no job file `../npt-gpt2`", "the ready job `npt-gpt2`"),
    ],
)
def test_a_source_that_is_no_job_is_explained(source: str, message: str, hint: str):
    """A wrong name or path says what is nearest or what to look for."""
    Path("folder").mkdir()
    Path("folder.yaml").mkdir()
    with Path("big.yaml").open("wb") as file:
        file.truncate((1 << 20) + 1)

    with pytest.raises(JobError) as caught:
        load_job(source)

    assert message in caught.value.message
    assert hint in (caught.value.hint or "")


def test_a_file_that_may_not_be_read_is_explained(monkeypatch: pytest.MonkeyPatch):
    """A missing permission is named as such."""

    def refuse(self: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    Path("secret.yaml").write_text("model: gpt2\n")
    monkeypatch.setattr(Path, "read_bytes", refuse)

    with pytest.raises(JobError, match="may not be read") as caught:
        load_job("secret.yaml")

    assert caught.value.hint == "check its permissions: `ls -l secret.yaml`"


def test_an_alias_bomb_ends():
    """Anchors that multiply into billions of items are read no deeper than a job goes."""
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 8)}]" for i in range(1, 12)]

    error = error_of("model: gpt2\n" + "\n".join(levels) + "\n")

    assert "`job.yaml` has 12 problems" in error.message


PACKED = {"loop": "hf_trainer", "method": "qlora", "quantization.storage": "bfloat16"}


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "is for `loop: hf_trainer`"),
        ({"loop": "hf_trainer", "parallel.strategy": "NO_SHARD"}, "which `NO_SHARD` does not ask"),
        ({"loop": "hf_trainer", "method": "qlora"}, "cannot shard 4-bit weights stored as bytes"),
        (PACKED | {"dtype": "float32"}, "its norms are float32 beside 4-bit weights stored in bfloat16"),
        (PACKED | {"quantization.kbit_preparation": True}, "makes norms float32 beside 4-bit weights"),
        (PACKED, "planned with autocast to that dtype alone"),
        (
            PACKED | {"autocast": "bfloat16", "parallel.strategy": "SHARD_GRAD_OP"},
            "stops in the first backward",
        ),
        ({"loop": "hf_trainer", "offload.params": True}, "`offload.params` is not planned"),
    ],
    ids=str,
)
def test_fsdp1_is_refused_where_it_is_not_planned(fields: dict[str, object], problem: str) -> None:
    sharded = {"model": "gpt2", "parallel.strategy": "FULL_SHARD", "parallel.fsdp_version": 1}
    degree = 1 if fields.get("parallel.strategy") == "NO_SHARD" else 2
    with pytest.raises(JobError, match=problem):
        load_job(None, flags=sharded | {"parallel.dp_shard": degree} | fields)


def test_4_bit_weights_that_fsdp2_would_cast_are_refused() -> None:
    sharded = {"model": "gpt2", "parallel.strategy": "FULL_SHARD", "parallel.dp_shard": 2}
    with pytest.raises(
        JobError, match="would cast 4-bit weights stored in bfloat16 to the float16"
    ) as refused:
        load_job(None, flags=sharded | PACKED | {"autocast": "float16"})
    assert "quantization.storage: float16" in str(refused.value.hint)
    assert load_job(None, flags=sharded | PACKED).job.quantization.storage == "bfloat16"
