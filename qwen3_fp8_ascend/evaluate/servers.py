"""A running OpenAI-compatible server: wait until it answers, what it says of itself, a client for it."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from qwen3_fp8_ascend.errors import BlockFp8Error


def wait_until_up(base_url: str, seconds: float, tick: Callable[[float], None] | None = None) -> None:
    """Return once a server answers, at the latest after `seconds`; `tick(waited)` is called before each pause.

    Raises:
        BlockFp8Error: it does not.
    """
    start = time.monotonic()
    while True:
        try:
            with urllib.request.urlopen(f"{_root(base_url)}/health", timeout=10):
                return
        except urllib.error.HTTPError as answer:
            if answer.code == 404:  # a server that is not vLLM may have no /health
                return
            error: Exception = answer
        except (OSError, ValueError) as refused:
            error = refused
        waited = time.monotonic() - start
        if waited >= seconds or isinstance(error, ValueError):
            raise BlockFp8Error(
                "no server is up there" + (f" after {seconds:g} s" if seconds else ""),
                where=base_url,
                got=f"{type(error).__name__}: {error}",
                fix="start one (scripts/serve_qwen3-8b-fp8.sh), give its address, or wait longer (--wait)",
            )
        if tick is not None:
            tick(waited)
        time.sleep(min(1.0, seconds - waited))


def server_facts(base_url: str, model: str | None = None) -> dict[str, Any]:
    """What a server says of itself: `url`, `model` (as served), `root` (the checkpoint), `max_model_len`, `vllm`.

    Without `model` the first one that it lists. `root` is the name of the folder that is served; where it lies is the
    server's affair (`served_root` says it).
    Raises:
        BlockFp8Error: the server cannot be reached, lists no model, or not this one.
    """
    entry = _listed(base_url, model)
    return {
        "url": base_url,
        "model": entry.id,
        "root": PurePath(_root_of(entry)).name,
        "max_model_len": getattr(entry, "max_model_len", None),
        "vllm": _vllm_version(base_url),
    }


def served_root(base_url: str, model: str) -> str:
    """The folder or hub name that a server has a model from.

    Raises:
        BlockFp8Error: as `server_facts`.
    """
    return _root_of(_listed(base_url, model))


def _root_of(entry: Any) -> str:
    return str(getattr(entry, "root", None) or entry.id)


def _listed(base_url: str, model: str | None) -> Any:
    openai, client = client_of(base_url)
    try:
        models = {entry.id: entry for entry in client.models.list().data}
    except openai.OpenAIError as error:
        raise unanswered(base_url, error) from error
    if not models:
        raise BlockFp8Error("the server lists no model", where=base_url, fix="look into the server's log")
    name = next(iter(models)) if model is None else model
    if name not in models:
        raise BlockFp8Error(
            f"the server does not serve {name!r}",
            where=base_url,
            expected=f"one of {', '.join(models)}",
            fix="give the model's served name with --model, or leave it out",
        )
    return models[name]


def _vllm_version(base_url: str) -> str | None:
    try:
        with urllib.request.urlopen(f"{_root(base_url)}/version", timeout=10) as answer:
            return json.load(answer)["version"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _root(base_url: str) -> str:
    return base_url.rstrip("/").removesuffix("/v1")


def client_of(base_url: str) -> tuple[Any, Any]:
    """The `openai` module and a client of this server.

    Raises:
        BlockFp8Error: the module is not installed.
    """
    try:
        import openai
    except ImportError as error:
        fix = "pip install 'qwen3-fp8-ascend[verify]'"
        raise BlockFp8Error("the openai client is not installed", fix=fix) from error
    return openai, openai.OpenAI(base_url=f"{_root(base_url)}/v1", api_key="none", max_retries=0, timeout=600)


def unanswered(base_url: str, error: Exception, model: str | None = None) -> BlockFp8Error:
    """What to say of a request that the server did not answer."""
    return BlockFp8Error(
        "the server did not answer",
        where=base_url if model is None else f"{base_url}, model {model!r}",
        got=f"{type(error).__name__}: {error}",
        fix="check that the server is up and that the model's name is the one it serves (/v1/models)",
    )
