"""Reading a job: formats, values, sources, layers and origins."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from memplan.errors import JobError
from memplan.job.fields import field_value, job_fields
from memplan.job.load import LoadedJob, load_job
from memplan.job.spec import Job

DESIGN_EXAMPLE = """
model: Qwen/Qwen2.5-7B-Instruct    # hub id | local folder
weights: pretrained
method: lora
dtype: bfloat16
autocast: null
micro_batch_size: 2
gradient_accumulation_steps: 8
max_seq_len: 2048
packing: false
activation_checkpointing: none
activation_offload: false
attention: sdpa
loss: full
optimizer: adamw
optimizer_kernel: fused
lora: {rank: 128, alpha: 256, dropout: 0.05, target_modules: all-linear, dtype: float32}
npt: {layers: [16, 17, 18, 19], rank: 8, modulation_scale: 0.1, form: factored}
quantization: {type: nf4, double_quant: true, kbit_preparation: false, skip: [lm_head]}
parallel: {strategy: FULL_SHARD, dp_shard: 2, dp_replicate: 1, tp: 1, pp: 1, cp: 1, ep: 1}
offload: {params: false, optimizer: false}
load: {ram_efficient: true}
data: {train: data/train.jsonl, eval: null, text: text}
train: {max_steps: 100, learning_rate: 1.0e-4, save_every: 50, output_dir: runs/qwen, seed: 0}
loop: memplan
gpu: null
allocator: {expandable_segments: true}
margin: null
"""


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test starts in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


def load(text: str, overrides: tuple[str, ...] = (), *, name: str = "job.yaml", **flags: Any) -> LoadedJob:
    Path(name).write_text(text, encoding="utf-8")
    return load_job(name, overrides, flags=flags)


def test_a_whole_job_is_read():
    """Every field of the file ends up in the job, with its own type."""
    job = load(DESIGN_EXAMPLE).job

    assert job.model == "Qwen/Qwen2.5-7B-Instruct"
    assert (job.micro_batch_size, job.gradient_accumulation_steps, job.max_seq_len) == (2, 8, 2048)
    assert (job.lora.rank, job.lora.alpha, job.lora.dropout) == (128, 256.0, 0.05)
    assert job.npt.layers == (16, 17, 18, 19)
    assert job.quantization.skip == ("lm_head",)
    assert job.parallel.strategy == "FULL_SHARD"
    assert job.train.learning_rate == 1e-4
    assert job.data.train == "data/train.jsonl"
    assert job.gpu is None


def test_a_job_of_one_line_is_all_defaults():
    """What the file does not say is the spec's default."""
    assert Job(model="gpt2") == load("model: gpt2\n").job


@pytest.mark.parametrize(
    ("field", "written", "expected"),
    [
        ("train.learning_rate", "1e-4", 1e-4),
        ("train.learning_rate", "'3e-3'", 3e-3),
        ("train.learning_rate", "1", 1.0),
        ("lora.alpha", "16", 16.0),
        ("max_seq_len", "1e3", 1000),
        ("max_seq_len", "2048.0", 2048),
        ("max_seq_len", "4_096", 4096),
        ("micro_batch_size", "010", 10),
        ("micro_batch_size", '"2"', 2),
        ("packing", "yes", True),
        ("packing", "Off", False),
        ("gpu", "24GB", "24GB"),
        ("gpu", "24", "24"),
        ("gpu", "off", "off"),
        ("gpu", "~", None),
        ("autocast", "none", None),
        ("autocast", "null", None),
        ("model", "1:30", "1:30"),
        ("train.output_dir", "2024-01-01", "2024-01-01"),
        ("train.max_grad_norm", "1.0", 1.0),
        ("margin", "5%", "5%"),
        ("lora.target_modules", "[q_proj, v_proj]", ("q_proj", "v_proj")),
        ("lora.target_modules", "q_proj", ("q_proj",)),
        ("lora.target_modules", "q_proj, v_proj", ("q_proj", "v_proj")),
        (
            "lora.target_modules",
            r"model.layers.[\d]+.self_attn.(q|k){1,2}_proj",
            r"model.layers.[\d]+.self_attn.(q|k){1,2}_proj",
        ),
        ("npt.layers", "all", "all"),
        ("npt.layers", "16,17", (16, 17)),
        ("npt.layers", "3", (3,)),
        ("quantization.skip", "[]", ()),
    ],
)
def test_the_field_decides_what_a_value_is(field: str, written: str, expected: Any):
    """YAML 1.1's own ideas (octal, sexagesimal, dates, text for 1e-4) never reach the job."""
    lines = {"model": "model: gpt2\n"}
    section, _, name = field.rpartition(".")
    lines[section or name] = f"{section}:\n  {name}: {written}\n" if section else f"{name}: {written}\n"

    actual = field_value(load("".join(lines.values())).job, field)

    assert expected == actual
    assert type(expected) is type(actual)


def test_formats_agree():
    """The same job in YAML, JSON and TOML is the same job."""
    yaml_job = load("model: gpt2\nmicro_batch_size: 2\nlora: {rank: 8, target_modules: [c_attn]}\n").job
    tree = {"model": "gpt2", "micro_batch_size": 2, "lora": {"rank": 8, "target_modules": ["c_attn"]}}
    json_job = load(json.dumps(tree), name="job.json").job
    toml_job = load(
        'model = "gpt2"\nmicro_batch_size = 2\n[lora]\nrank = 8\ntarget_modules = ["c_attn"]\n',
        name="job.toml",
    ).job

    assert yaml_job == json_job == toml_job
    assert yaml_job.lora.target_modules == ("c_attn",)


def test_dotted_fields_and_empty_sections_are_read():
    """`lora.rank: 8` is `lora: {rank: 8}`, and a section whose fields are commented out is no error."""
    job = load("model: gpt2\nlora.rank: 8\ntrain:\n  # max_steps: 3\nnpt: {}\n").job

    assert Job(model="gpt2").replace(**{"lora.rank": 8}) == job


def test_anchors_are_read():
    """A YAML alias stands for the value of its anchor."""
    assert load("model: gpt2\nmicro_batch_size: &two 2\ngradient_accumulation_steps: *two\n").job == Job(
        model="gpt2", micro_batch_size=2, gradient_accumulation_steps=2
    )


def test_a_byte_order_mark_is_no_part_of_the_first_field():
    """Files from Windows editors are read."""
    assert load("\ufeffmodel: gpt2\n").job.model == "gpt2"


def test_the_command_line_is_laid_over_the_file():
    """The file gives way to flags, and flags to overrides; the last override holds."""
    loaded = load(
        "model: gpt2\nmicro_batch_size: 1\nmax_seq_len: 1\nlora: {rank: 1}\n",
        ("max_seq_len=30", "lora.rank=8", "lora.rank=16"),
        max_seq_len=20,
        micro_batch_size="2",
        packing=None,
    )

    assert Job(model="gpt2", micro_batch_size=2, max_seq_len=30).replace(**{"lora.rank": 16}) == loaded.job


def test_overrides_are_yaml():
    """Lists, null, quoted text and whole sections can be set."""
    job = load(
        "model: gpt2\ngpu: 24GB\n",
        ("npt.layers=[1, 2]", "gpu=", "train={max_steps: 7, seed: 1}", 'data.text="a: b"', "data.eval=x=y"),
    ).job

    assert job.npt.layers == (1, 2)
    assert job.gpu is None
    assert (job.train.max_steps, job.train.seed) == (7, 1)
    assert (job.data.text, job.data.eval) == ("a: b", "x=y")


def test_a_job_needs_no_file():
    """Flags and overrides can describe a job by themselves."""
    loaded = load_job(None, ["lora.rank=4"], flags={"model": "gpt2", "dtype": "float32"})

    assert Job(model="gpt2", dtype="float32").replace(**{"lora.rank": 4}) == loaded.job
    assert loaded.path is None
    assert Path.cwd() == loaded.base_dir


def test_standard_input_is_yaml(monkeypatch: pytest.MonkeyPatch):
    """`-` reads the job from standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"model: gpt2\nmax_seq_len: 7\n")))

    loaded = load_job("-")

    assert Job(model="gpt2", max_seq_len=7) == loaded.job
    assert loaded.path is None


def test_origins_tell_who_set_every_field():
    """Every leaf has an origin: what the user wrote, another tool's name, or nothing."""
    loaded = load(
        "model: gpt2\nmax_length: 64\nlora: {r: 8}\noptim: adamw_torch\ndtype: bf16\nseed: 3\n",
        ("cutoff_len=32", "npt.rank=2"),
        packing=True,
    )
    expected = dict.fromkeys(job_fields(), "memplan default") | {
        "model": "user",
        "max_seq_len": "user",
        "packing": "user",
        "npt.rank": "user",
        "lora.rank": "alias",
        "optimizer": "alias",
        "optimizer_kernel": "alias",
        "dtype": "alias",
        "train.seed": "alias",
    }

    assert expected == loaded.origins


def test_a_value_equal_to_the_default_is_still_the_users():
    """Origins are about who said it, not about what was said."""
    assert load("model: gpt2\nmicro_batch_size: 1\n").origins["micro_batch_size"] == "user"


def test_a_file_in_the_current_folder_wins_over_a_ready_job():
    """A name is first a file here, then a ready job."""
    assert load_job("npt-gpt2").job.method == "npt"

    Path("npt-gpt2").write_text("model: gpt2\nmethod: full\n")

    assert load_job("npt-gpt2").job.method == "full"
    assert Path("npt-gpt2") == load_job("npt-gpt2").path


def test_a_folder_does_not_hide_a_ready_job():
    """A run's output folder may be called like the job."""
    Path("npt-gpt2").mkdir()

    assert load_job("npt-gpt2").job.method == "npt"


@pytest.mark.parametrize(
    "source",
    ["gpt2", "Qwen/Qwen3-8B", "nobody/nothing-7B", "model", "./model", "model/config.json", "it's"],
)
def test_a_model_is_a_job_that_says_nothing_else(source: str):
    """A name of the catalogue, a hub id, a folder with a config.json, and that file."""
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    Path("it's").mkdir()
    Path("it's/config.json").write_text("{}")

    loaded = load_job(source, ["micro_batch_size=2"])

    assert (loaded.job.model, loaded.job.micro_batch_size, loaded.path) == (source, 2, None)
    assert loaded.job == load_job(None, ["micro_batch_size=2"], flags={"model": source}).job


def test_a_file_wins_over_a_model_of_its_name():
    """A name is a model where it is no file and no ready job."""
    Path("gpt2").write_text("model: Qwen/Qwen3-8B\n")

    assert load_job("gpt2").job.model == "Qwen/Qwen3-8B"


@pytest.mark.parametrize("source", ["./npt-gpt2", "npt-gpt2.yaml", Path("npt-gpt2")])
def test_what_looks_like_a_path_is_a_path(source: str | Path):
    """A slash, a suffix of ours or a `Path` never means a ready job."""
    with pytest.raises(JobError, match="there is no job file") as caught:
        load_job(source)

    assert caught.value.hint == "did you mean the ready job `npt-gpt2`?"


def test_data_paths_are_relative_to_the_job_file(tmp_path: Path):
    """`resolve_path` starts at the file's folder, leaves absolute paths alone, and knows `~`."""
    Path("jobs").mkdir()
    loaded = load("model: gpt2\ndata: {train: train.jsonl}\n", name="jobs/job.yaml")

    assert tmp_path / "jobs" / "train.jsonl" == loaded.resolve_path("train.jsonl")
    assert Path("/data/x.jsonl") == loaded.resolve_path("/data/x.jsonl")
    assert Path.home() / "x.jsonl" == loaded.resolve_path("~/x.jsonl")


def test_data_paths_on_the_command_line_are_found_from_here(tmp_path: Path):
    """A path typed with tab completion works, though the job file lies elsewhere; others stay as written."""
    Path("jobs").mkdir()
    Path("mine.jsonl").write_text("{}")
    overrides = ("data.train=mine.jsonl", "data.eval=memplan-docs")

    loaded = load("model: gpt2\n", overrides, name="jobs/job.yaml")

    assert tmp_path / "mine.jsonl" == loaded.resolve_path(loaded.job.data.train or "")
    assert loaded.job.data.eval == "memplan-docs"
    assert (
        load("model: gpt2\n", ("data.train=other.jsonl",), name="jobs/job.yaml").job.data.train
        == "other.jsonl"
    )


def test_a_ready_jobs_data_is_relative_to_here(tmp_path: Path):
    """A ready job lies inside the package; nobody's data does."""
    assert tmp_path / "mine.jsonl" == load_job("npt-gpt2").resolve_path("mine.jsonl")


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("method: full\nlora: {rank: 8, alpha: 16}", "`lora.rank` and `lora.alpha` have no effect"),
        ("method: lora\nquantization: {type: fp4}", "`quantization.type` has no effect with `method: lora`"),
        ("method: lora\nnpt: {rank: 8}", "only `npt` uses `npt`"),
        ("method: full\nbf16: true", "weights that train in bfloat16 have no float32 copy"),
        ("activation_offload: true", "has no effect without `activation_checkpointing`"),
        ("train: {max_steps: 10, warmup_steps: 10}", "never reaches its peak"),
    ],
)
def test_settings_without_effect_are_noted(text: str, note: str):
    """A setting that does nothing is no error, and is not passed over in silence."""
    (actual,) = load(f"model: gpt2\n{text}\n").notes

    assert note in actual


@pytest.mark.parametrize(
    "text",
    [
        "method: lora\nbf16: true",
        "method: full\nbf16: true\nloop: hf_trainer\nparallel: {strategy: FULL_SHARD, dp_shard: 2}",
        "method: full\ndtype: float32\nbf16: true",
    ],
)
def test_autocast_that_has_an_effect_is_not_noted(text: str):
    """Adapters are float32 by default, and accelerate makes float32 copies of what FSDP shards."""
    assert () == load(f"model: gpt2\n{text}\n").notes


@pytest.mark.parametrize(
    "text",
    [
        "method: qlora\ndtype: float32\nquantization: {type: fp4}",
        "method: npt\nloss: fused",
        "optimizer: paged_adamw_8bit\noptimizer_kernel: loop",
        "autocast: bfloat16\ndtype: float32",
        "parallel: {strategy: HYBRID_SHARD, dp_shard: 2, dp_replicate: 2}",
        "parallel: {strategy: NO_SHARD, dp_replicate: 8}",
        "parallel: {strategy: ZERO_3, dp_shard: 4}",
        "allocator: {max_split_size_mb: 20, garbage_collection_threshold: 0.8, roundup_power2_divisions: 16}",
        "margin: 0",
        "margin: 1.5GiB",
    ],
)
def test_jobs_in_order_have_no_notes(text: str):
    """Combinations that make sense pass without a word."""
    assert load(f"model: gpt2\n{text}\n").notes == ()
