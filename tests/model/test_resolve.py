"""`resolve_model` finds what a job names: a config, the catalogue, the cache, the hub; or says why not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

import memplan
from memplan.errors import ModelError, UnknownModel
from memplan.model import resolve_config, resolve_model

SMALL: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 128,
}


@pytest.fixture(autouse=True)
def empty_surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory, an empty hub cache, no token, and no network."""
    for name in (
        "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH",
        "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY",
    ):  # fmt: skip
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def write(folder: Path, config: Any = SMALL, name: str = "config.json") -> Path:
    """A config file, its folders made as needed."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(config if isinstance(config, str) else json.dumps(config), encoding="utf-8")
    return path


def cache(tmp_path: Path, hub_id: str, config: Any = SMALL) -> None:
    """A config in the hub's cache, as huggingface_hub leaves it."""
    folder = tmp_path / "hf" / "hub" / f"models--{hub_id.replace('/', '--')}"
    write(folder / "snapshots" / "abc123", config)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc123")


def test_local_file_and_folder(tmp_path: Path) -> None:
    """A config.json, the folder that holds it, and any other .json file are read; the source is the file."""
    path = write(tmp_path / "model")
    other = write(tmp_path, name="my-config.json")

    assert 64 == resolve_model(str(path)).hidden_size
    assert str(path) == resolve_model(str(tmp_path / "model")).source
    assert str(other) == resolve_model(str(other)).source
    assert str(other) == resolve_model(str(other)).name


def test_relative_to_base_dir_then_working_directory(tmp_path: Path) -> None:
    """A relative path is meant from the job file's folder first, then from here."""
    write(tmp_path / "work" / "a", {**SMALL, "num_hidden_layers": 3})
    assert 3 == resolve_model("a", base_dir=tmp_path).num_hidden_layers

    write(tmp_path / "a", {**SMALL, "num_hidden_layers": 5})
    assert 5 == resolve_model("a", base_dir=tmp_path).num_hidden_layers
    assert 3 == resolve_model("./a").num_hidden_layers


def test_folder_wins_over_catalogue(tmp_path: Path) -> None:
    """A folder of the same name is what the user sees, so it wins; without a config the catalogue answers."""
    (tmp_path / "work" / "gpt2").mkdir()
    assert "gpt2" == resolve_model("gpt2").family

    write(tmp_path / "work" / "gpt2")
    assert "llama" == resolve_model("gpt2").family


def test_catalogue_by_name_and_hub_id() -> None:
    """A catalogue name or hub id in any case needs no network; the source names the entry and its source."""
    by_name, by_id = resolve_model("llama-3.1-8b"), resolve_model("META-llama/Llama-3.1-8B-instruct")

    assert (32, 8, 128) == (by_name.num_hidden_layers, by_name.num_key_value_heads, by_name.head_dim)
    assert "META-llama/Llama-3.1-8B-instruct" == by_id.name
    assert by_id.source.startswith("catalogue entry llama-3.1-8b: ")


def test_catalogue_entry_without_a_program() -> None:
    """A known model of an unknown family is exit code 3; its config can still be had for the trace writer."""
    with pytest.raises(UnknownModel, match="Starcoder2ForCausalLM"):
        resolve_model("bigcode/starcoder2-7b")

    assert "starcoder2" == resolve_config("bigcode/starcoder2-7b").config["model_type"]


@pytest.mark.parametrize("variable", ["HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"])
def test_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """The cache is read where each of huggingface_hub's variables puts it, through refs/main."""
    cache(tmp_path, "someone/model")
    if variable != "HF_HOME":
        monkeypatch.setenv("HF_HOME", str(tmp_path / "elsewhere"))
        monkeypatch.setenv(variable, str(tmp_path / "hf" / "hub"))

    architecture = resolve_model("someone/model")
    assert 64 == architecture.hidden_size
    assert "snapshots" in architecture.source


def test_hub_cache_without_config(tmp_path: Path) -> None:
    """A cached model whose config was never downloaded does not count as cached."""
    cache(tmp_path, "someone/model")
    (tmp_path / "hf/hub/models--someone--model/snapshots/abc123/config.json").unlink()

    with pytest.raises(ModelError, match="offline"):
        resolve_model("someone/model")


def test_bare_name_in_cache(tmp_path: Path) -> None:
    """A canonical id without an organisation is looked up in the cache too."""
    cache(tmp_path, "oldmodel")

    assert 64 == resolve_model("oldmodel").hidden_size


@pytest.mark.parametrize(
    ("reference", "says", "hints"),
    [
        ("someone/model", "offline", "local config.json"),
        ("lama-3.1-8b", "no model", "`llama-3.1-8b`"),
        ("", "No model is named", "memplan models"),
        ("./nowhere", "not a config.json", "folder"),
        ("nowhere/config.json", "not a config.json", "folder"),
        ("~nobody-at-all/model", "not a config.json", "folder"),
        ("a b c", "no model", "memplan models"),
        ("x" * 400, "no model", "memplan models"),
    ],
)
def test_not_found(reference: str, says: str, hints: str) -> None:
    """What cannot be found is explained, with the nearest names or the way out."""
    with pytest.raises(ModelError) as failure:
        resolve_model(reference)

    assert says in failure.value.message
    assert failure.value.hint is not None
    assert hints in failure.value.hint


@pytest.mark.parametrize(
    ("config", "says"),
    [("{not json", "not valid JSON"), ("[1]", "JSON object"), ({"hidden_size": 1}, "neither")],
)
def test_unreadable_config(tmp_path: Path, config: Any, says: str) -> None:
    """A file that holds no model config is an error of one sentence."""
    with pytest.raises(ModelError, match=says):
        resolve_model(str(write(tmp_path, config)))


def test_weights_file_is_not_read(tmp_path: Path) -> None:
    """A weights file named by mistake is refused by its name, never read."""
    path = write(tmp_path, "x" * 100, name="model.safetensors")

    with pytest.raises(ModelError, match=r"not a config\.json"):
        resolve_model(str(path))


def test_adapter_folder(tmp_path: Path) -> None:
    """A folder with an adapter only points to the adapter's base model."""
    write(tmp_path / "adapter", name="adapter_config.json")

    with pytest.raises(ModelError, match="adapter") as failure:
        resolve_model(str(tmp_path / "adapter"))
    assert "base_model_name_or_path" in (failure.value.hint or "")


@dataclass
class Hub:
    """A hub on the loopback address: what it serves, and what it was asked."""

    answers: dict[str, tuple[int, Any]] = field(default_factory=dict)
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    port: int = 0

    def serve(self, hub_id: str, status: int, body: Any = "") -> None:
        self.answers[f"/{hub_id}/resolve/main/config.json"] = (status, body)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running hub that `HF_ENDPOINT` points to."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            hub.asked.append((self.path, self.headers.get("Authorization")))
            status, body = hub.answers.get(self.path, (404, ""))
            self.send_response(status)
            if status in (302, 307):
                self.send_header("Location", body)
            self.end_headers()
            self.wfile.write((body if isinstance(body, str) else json.dumps(body)).encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    hub.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{hub.port}/")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    yield hub
    server.shutdown()
    server.server_close()


def test_fetch(hub: Hub) -> None:
    """What is nowhere here is fetched: the config alone, and its address is the source."""
    hub.serve("someone/model", 200, SMALL)

    architecture = resolve_model("someone/model")
    assert 64 == architecture.hidden_size
    assert architecture.source.endswith("/someone/model/resolve/main/config.json")
    assert [("/someone/model/resolve/main/config.json", None)] == hub.asked


def test_fetch_not_when_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """`offline=True` and HF_HUB_OFFLINE ask nobody; `offline=False` overrides the variable."""
    hub.serve("someone/model", 200, SMALL)
    with pytest.raises(ModelError, match="offline"):
        resolve_model("someone/model", offline=True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match="offline"):
        resolve_model("someone/model")

    assert [] == hub.asked
    assert 64 == resolve_model("someone/model", offline=False).hidden_size


def test_token_stays_on_its_host(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token goes to the hub, through its own redirects, and not to another host that it redirects to."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.serve("gated/same", 307, "/gated/inner/resolve/main/config.json")
    hub.serve("gated/inner", 200, SMALL)
    hub.serve("gated/other", 307, f"http://localhost:{hub.port}/gated/inner/resolve/main/config.json")

    resolve_model("gated/same")
    assert ["Bearer secret", "Bearer secret"] == [token for _, token in hub.asked]
    hub.asked.clear()
    resolve_model("gated/other")
    assert ["Bearer secret", None] == [token for _, token in hub.asked]


def test_stored_token(hub: Hub, tmp_path: Path) -> None:
    """Without HF_TOKEN, the token that a login stored is used."""
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "token").write_text("stored\n")
    hub.serve("gated/model", 200, SMALL)

    resolve_model("gated/model")
    assert ["Bearer stored"] == [token for _, token in hub.asked]


@pytest.mark.parametrize(
    ("status", "says", "hints"),
    [
        (401, "gated", "HF_TOKEN"),
        (403, "gated", "HF_TOKEN"),
        (404, "no config.json", "spelling"),
        (500, "500", "later"),
    ],
)
def test_refusals(hub: Hub, status: int, says: str, hints: str) -> None:
    """Each refusal of the hub has its own sentence and remedy, and the nearest names."""
    hub.serve("Qwen/Qwen2.5-7B-Instrukt", status)

    with pytest.raises(ModelError) as failure:
        resolve_model("Qwen/Qwen2.5-7B-Instrukt")
    assert says in failure.value.message
    assert hints in (failure.value.hint or "")
    assert "`qwen2.5-7b-instruct`" in (failure.value.hint or "")


def test_unreachable_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No network is one sentence and a way on, not a traceback."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as nobody:  # its port is taken, and does not listen
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{nobody.getsockname()[1]}")

        with pytest.raises(ModelError, match="cannot be reached") as failure:
            resolve_model("someone/model", offline=False)
    assert "memplan models" in (failure.value.hint or "")


def test_endpoint_must_be_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An endpoint of another scheme is refused, so that it cannot name a local file."""
    write(tmp_path / "someone/model/resolve/main")
    monkeypatch.setenv("HF_ENDPOINT", f"file://{tmp_path}")

    with pytest.raises(ModelError, match="HF_ENDPOINT"):
        resolve_model("someone/model", offline=False)


def test_nothing_heavy_is_imported() -> None:
    """Resolving from the catalogue imports no transformers, torch, hub library or urllib."""
    program = (
        "import sys; from memplan.model import resolve_model, parameters;"
        "parameters(resolve_model('qwen2.5-7b'));"
        "print([m for m in ('torch', 'transformers', 'huggingface_hub', 'numpy', 'urllib.request', 'difflib')"
        " if m in sys.modules])"
    )

    environment = {**os.environ, "PYTHONPATH": str(Path(memplan.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert "[]" == done.stdout.strip()
