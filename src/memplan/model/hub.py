"""
`config.json` of a model on the hub: from the cache of huggingface_hub, else over https. Never any weights.

Reads the cache's layout and the environment variables by themselves (`huggingface_hub/constants.py`,
`file_download.py`), since importing huggingface_hub costs more than the whole planning path.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from memplan.errors import ModelError

_DEFAULT_ENDPOINT = "https://huggingface.co"
_TIMEOUT_S = 8.0
_MAX_CONFIG_BYTES = 4 << 20
_TRUE = ("1", "on", "yes", "true")


def is_offline() -> bool:
    """Whether `HF_HUB_OFFLINE` or `TRANSFORMERS_OFFLINE` forbids the network."""
    return any(
        os.environ.get(name, "").lower() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def cached_config_path(hub_id: str) -> Path | None:
    """
    The cached `config.json` of the revision that `main` last pointed to; None if it was never downloaded.

    Layout: `<cache>/models--<org>--<name>/refs/main` holds a commit, `snapshots/<commit>/` its files.
    """
    folder = _cache_folder() / f"models--{hub_id.replace('/', '--')}"
    try:
        commit = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    path = folder / "snapshots" / commit / "config.json"
    return path if path.is_file() else None


def fetch_config(hub_id: str) -> tuple[dict[str, Any], str]:
    """
    The `config.json` of the revision `main`, and its address.

    Honours `HF_ENDPOINT` and `HF_TOKEN` (or the token that `hf auth login` stored). Raises `ModelError` when
    the model does not exist, is gated, or the hub cannot be reached.
    """
    from urllib.error import HTTPError, URLError

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or _DEFAULT_ENDPOINT
    address = f"{endpoint}/{hub_id}/resolve/main/config.json"
    try:
        content = _download(address)
    except HTTPError as error:
        raise _refusal(hub_id, error.code) from None
    except (URLError, OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise ModelError(
            f"The config.json of {hub_id} is not cached here, and {endpoint} cannot be reached: {reason}",
            hint="Name a local config.json or folder",
        ) from None
    return _parse(content, address), address


def read_config(path: Path) -> dict[str, Any]:
    """The config in a file; `ModelError` if it cannot be read or holds something else."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", hint="Check its permissions") from None
    return _parse(content, str(path))


def _parse(content: bytes, where: str) -> dict[str, Any]:
    """The JSON object in a config file; `ModelError` if it holds something else."""
    try:
        config = json.loads(content)
    except ValueError as error:
        raise ModelError(
            f"{where} is not valid JSON: {error}", hint="Name the config.json of a model"
        ) from None
    if not isinstance(config, dict):
        raise ModelError(f"{where} does not hold a JSON object", hint="Name the config.json of a model")
    return config


def _download(address: str) -> bytes:
    from urllib.parse import urlsplit
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    class KeepTokenOnHost(HTTPRedirectHandler):
        """Redirects within the hub need the token for gated models; other hosts must not see it."""

        def redirect_request(self, request: Any, *answer: Any) -> Any:
            redirected = super().redirect_request(request, *answer)
            authorization = request.unredirected_hdrs.get("Authorization")
            if redirected and authorization and urlsplit(redirected.full_url)[:2] == urlsplit(address)[:2]:
                redirected.add_unredirected_header("Authorization", authorization)
            return redirected

    if not address.startswith(("https://", "http://")):
        raise ValueError(f"`HF_ENDPOINT` must start with https://, not {address.partition(':')[0]}:")
    request = Request(address, headers={"User-Agent": "memplan"})
    token = _token()
    if token:
        request.add_unredirected_header("Authorization", f"Bearer {token}")
    with build_opener(KeepTokenOnHost).open(request, timeout=_TIMEOUT_S) as response:
        content: bytes = response.read(_MAX_CONFIG_BYTES + 1)
    if len(content) > _MAX_CONFIG_BYTES:
        raise ValueError("the file is too large to be a config.json")
    return content


def _refusal(hub_id: str, status: int) -> ModelError:
    if status in (401, 403):
        return ModelError(
            f"The hub refuses the config.json of {hub_id} (HTTP {status}): none such, or gated, or private",
            hint="Check the spelling, accept its licence and set `HF_TOKEN`, or name a local config.json",
        )
    if status == 404:
        return ModelError(
            f"The hub has no config.json for {hub_id}", hint="Check the spelling on the model's page"
        )
    return ModelError(
        f"The hub answered HTTP {status} for the config.json of {hub_id}",
        hint="Try again later, or name a local config.json",
    )


def _hf_home() -> Path:
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface"
    return _expand(os.environ.get("HF_HOME") or str(default))


def _cache_folder() -> Path:
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    return _expand(named) if named else _hf_home() / "hub"


def _token() -> str | None:
    token = os.environ.get("HF_TOKEN") or os.environ.get("HUGGING_FACE_HUB_TOKEN")
    if not token:
        path = _expand(os.environ.get("HF_TOKEN_PATH") or str(_hf_home() / "token"))
        try:
            token = path.read_text(encoding="utf-8")
        except OSError:
            return None
    return token.strip() or None


def _expand(path: str) -> Path:
    return Path(os.path.expandvars(path)).expanduser()
