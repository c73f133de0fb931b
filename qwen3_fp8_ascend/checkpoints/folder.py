"""Read a checkpoint folder: config.json, the index, and the header of every weight file."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from qwen3_fp8_ascend.checkpoints.anomaly import Anomaly, CheckpointError, collect, fault
from qwen3_fp8_ascend.checkpoints.strict_json import DAMAGED, read_object
from qwen3_fp8_ascend.checkpoints.weight_file import FileHeader, TensorEntry, is_plain_text, is_tensor_name, read_header
from qwen3_fp8_ascend.errors import printable

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
WEIGHTS_SUFFIX = ".safetensors"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
MAX_CONFIG_BYTES = 16 << 20
MAX_INDEX_BYTES = 100_000_000
MAX_FILES = 1000
"""Several times as many weight files as the largest models have."""

MAX_TENSORS = 200_000
"""Of a checkpoint: twice DeepSeek-V3's. Looking at one takes about 20 microseconds."""

NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")
OF_A_RANK = re.compile(r"model-rank-\d+-part-\d+\.safetensors")
"""Files of vLLM's `save_sharded_state`: a rank's tensors as its kernels want them, under the names of merged layers."""

MODELOPT_CONFIG = "hf_quant_config.json"
"""Where ModelOpt up to 0.29 puts its quantization_config."""

QUANTIZATION_KEYS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Checkpoint:
    """A folder's weights as their headers describe them; `tensors` is sorted by name.

    `anomalies` are the faults of files, headers and index; `unused` are weight files that the index does not name.
    """

    folder: Path
    config: Mapping[str, Any]
    files: tuple[FileHeader, ...]
    tensors: Mapping[str, TensorEntry]
    has_index: bool
    quantization: tuple[Any, str] | None = None
    """The quantization_config and where it stands."""
    unused: tuple[str, ...] = ()
    anomalies: tuple[Anomaly, ...] = field(default=())

    def path(self, file: str) -> Path:
        return self.folder / file


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read everything about a checkpoint except its weights; a checkpoint with any fault is refused.

    Raises:
        BlockFp8Error: as for `survey_checkpoint`, and for the first error among the anomalies.
    """
    checkpoint = survey_checkpoint(folder)
    errors = [anomaly for anomaly in checkpoint.anomalies if anomaly.severity == "error"]
    if errors:
        raise CheckpointError(errors[0], len(errors) - 1)
    return checkpoint


def survey_checkpoint(folder: Path) -> Checkpoint:
    """Read everything about a checkpoint except its weights; faulty files become anomalies.

    Raises:
        BlockFp8Error: there is no such folder, config.json is unreadable, or there are no safetensors files.
    """
    names = _list(folder)
    described = _weight_bytes(folder, names)
    config = read_object(folder / CONFIG, CONFIG, MAX_CONFIG_BYTES, described) if CONFIG in names else None
    if config is None:
        unfinished = "journal.json" in names or folder.parent.name.endswith(".incomplete")
        raise fault(
            "the folder is an unfinished conversion" if unfinished else "the folder has no config.json",
            file=str(folder),
            fix="run the conversion again; it continues where it stopped"
            if unfinished
            else "give the folder of a Hugging Face checkpoint: config.json beside *.safetensors",
        )
    weight_map = _read_index(folder, described) if INDEX in names else None
    files = _weight_files(names, weight_map)
    if len(files) > MAX_FILES:
        raise fault(
            "the folder has more weight files than any model",
            file=printable(str(folder)),
            expected=f"at most {MAX_FILES}",
            got=len(files),
            fix="give the folder of one checkpoint",
        )
    headers: list[FileHeader] = []
    tensors: dict[str, TensorEntry] = {}

    def find() -> Iterator[Anomaly]:
        if weight_map is not None:
            yield from _missing_files(names, weight_map)
        elif files != [SINGLE]:
            yield from _missing_numbers(files)
        yield from _read_headers(folder, files, headers, tensors)
        if weight_map is not None:
            yield from _cross_check(weight_map, tensors, {header.file for header in headers})

    anomalies = collect(find())
    used = set(files)
    unused = tuple(sorted(n for n in names if n.endswith(WEIGHTS_SUFFIX) and n not in used))
    ordered = dict(sorted(tensors.items()))
    quantization = find_quantization(config)
    if quantization is None and MODELOPT_CONFIG in names:
        found = read_object(folder / MODELOPT_CONFIG, MODELOPT_CONFIG, MAX_CONFIG_BYTES, described)
        quantization = found, MODELOPT_CONFIG
    return Checkpoint(
        folder, config, tuple(headers), ordered, weight_map is not None, quantization, unused, tuple(anomalies)
    )


def find_quantization(config: Mapping[str, Any]) -> tuple[Any, str] | None:
    """The checkpoint's quantization_config and where in config.json it stands, or None.

    Multimodal models may keep it in ``text_config``; compressed-tensors once called it ``compression_config``.
    """
    for holder, where in ((config, CONFIG), (config.get("text_config"), f"{CONFIG}: text_config")):
        if isinstance(holder, Mapping):
            for key in QUANTIZATION_KEYS:
                if holder.get(key) is not None:
                    return holder[key], f"{where}: {key}" if holder is config else f"{where}.{key}"
    return None


def _list(folder: Path) -> set[str]:
    if folder.is_file():
        hint = "`qwen3-fp8-ascend` reads folders; expand a GGUF file with transformers first"
        raise fault("this is a file, not a checkpoint folder", file=str(folder), fix=hint)
    try:
        return set(os.listdir(folder))
    except (OSError, ValueError) as error:
        raise fault(
            "the checkpoint folder cannot be read",
            file=str(folder),
            got=getattr(error, "strerror", error),
            fix="give a local folder; `hf download` or `modelscope download` fetches one",
        ) from None


def leaving_link(path: Path, folder: Path) -> Path | None:
    """Where a link leads that leaves the checkpoint folder; None if it is no such link.

    A Hugging Face cache is snapshots/<revision>/<file> -> ../../blobs/<digest>: these do not leave the checkpoint.
    """
    if not path.is_symlink():
        return None
    resolved, root = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    if resolved.is_relative_to(root) or resolved.is_relative_to(root.parent.parent / "blobs"):
        return None
    return resolved


def _weight_bytes(folder: Path, names: set[str]) -> int:
    """Size of all weight files: what config.json and the index may be expected to describe."""
    total = 0
    for name in names:
        if name.endswith(WEIGHTS_SUFFIX):
            with suppress(OSError):  # said when the file is read
                total += os.stat(folder / name).st_size
    return total


def _read_headers(
    folder: Path, files: Sequence[str], headers: list[FileHeader], tensors: dict[str, TensorEntry]
) -> Iterator[Anomaly]:
    """Fill `headers` and `tensors` from the files."""
    for file in files:
        target = leaving_link(folder / file, folder)
        if target is not None:
            yield Anomaly(
                "a weight file is a link that leaves the checkpoint folder",
                file=file,
                got=printable(str(target)),
                fix="make sure that you know the file that it leads to",
                severity="warning",
            )
        try:
            header = read_header(folder / file)
        except CheckpointError as error:
            yield error.anomaly
            continue
        headers.append(header)
        if len(tensors) + len(header.tensors) > MAX_TENSORS:
            raise fault(
                "the folder has more tensors than any model",
                file=file,
                expected=f"at most {MAX_TENSORS}",
                fix="give the folder of one checkpoint",
            )
        for tensor in header.tensors:
            first = tensors.setdefault(tensor.name, tensor)
            if first is not tensor:
                yield Anomaly(
                    "a tensor is in two files",
                    file=tensor.file,
                    tensor=tensor.name,
                    expected=f"only in {first.file}",
                    got=f"also in {tensor.file}",
                    fix="remove the file that does not belong to this checkpoint",
                )


def _read_index(folder: Path, described: int) -> dict[str, str]:
    index = read_object(folder / INDEX, "the index", MAX_INDEX_BYTES, described)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise fault("the index has no weight_map", file=INDEX, fix=DAMAGED)
    for tensor, file in weight_map.items():
        if not is_tensor_name(tensor):
            raise fault("a tensor's name is empty, too long, or unprintable", file=INDEX, got=ascii(tensor[:100]))
        if not isinstance(file, str) or not _is_plain_file_name(file):
            raise fault(
                "the index names a file that is not a plain *.safetensors name",
                file=INDEX,
                tensor=tensor,
                expected="a file in the checkpoint folder itself",
                got=ascii(file)[:200],
                fix="do not use this checkpoint unless you know who made it",
            )
    return weight_map


def _is_plain_file_name(name: str) -> bool:
    return is_plain_text(name) and not set(name) & {"/", "\\"} and name.endswith(WEIGHTS_SUFFIX)


def _weight_files(names: set[str], weight_map: Mapping[str, str] | None) -> Sequence[str]:
    if weight_map is not None:
        return sorted(names.intersection(weight_map.values()))
    if SINGLE in names:
        return [SINGLE]
    files = sorted(name for name in names if name.endswith(WEIGHTS_SUFFIX))
    if not files:
        raise _no_weights(names)
    for file in files:
        if not is_plain_text(file):
            raise fault("a weight file's name is unprintable", file=ascii(file))
        if OF_A_RANK.fullmatch(file):
            raise fault(
                "the folder holds what vLLM saved of its ranks (sharded_state), packed for one kind of machine",
                file=file,
                expected="a checkpoint's own files",
                fix="give the checkpoint that was served when it was saved",
            )
    return files


def _missing_files(names: set[str], weight_map: Mapping[str, str]) -> Iterator[Anomaly]:
    for file, count in sorted(Counter(weight_map.values()).items()):
        if file not in names:
            yield Anomaly(
                "a file that the index names is missing",
                file=file,
                expected=f"{count} tensors",
                fix="the download is incomplete; download the file",
            )


def _missing_numbers(files: Sequence[str]) -> list[Anomaly]:
    """Files say ``-00001-of-00004``; without an index this is the only sign that one is missing."""
    totals = {int(match[2]) for file in files if (match := NUMBERED.search(file))}
    present = {int(match[1]) for file in files if (match := NUMBERED.search(file))}
    total = max(totals, default=0)
    missing = (number for number in range(1, total + 1) if number not in present)
    first = list(islice(missing, 9))  # a single name may claim 99,999 files
    if not first:
        return []
    shown = ", ".join(map(str, first[:8])) + (", …" if len(first) > 8 else "")
    return [
        Anomaly(
            "weight files are missing",
            expected=f"{total} files",
            got=f"no file {shown}",
            fix="the download is incomplete; download the missing files",
        )
    ]


def _no_weights(names: set[str]) -> CheckpointError:
    pickles = sorted(name for name in names if name.endswith(PICKLE_SUFFIXES))
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    if pickles:
        return fault(
            "the folder has pickled weights only, which are never loaded: a pickle can run any code",
            file=pickles[0],
            expected=f"*{WEIGHTS_SUFFIX}",
            fix="use a revision of the model with safetensors files, or convert it where you trust the file",
        )
    if gguf:
        return fault(
            "the folder has GGUF weights only",
            file=gguf[0],
            expected=f"*{WEIGHTS_SUFFIX}",
            fix="expand it to bf16 first: transformers' from_pretrained(folder, gguf_file=...) and save_pretrained; "
            "then `qwen3-fp8-ascend quantize`",
        )
    return fault(
        "the folder has no weights", expected=f"*{WEIGHTS_SUFFIX}", fix="download the checkpoint's *.safetensors files"
    )


def _cross_check(
    weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry], readable: set[str]
) -> Iterator[Anomaly]:
    for name, file in sorted(weight_map.items()):
        if file not in readable:
            continue
        entry = tensors.get(name)
        if entry is None or entry.file != file:
            yield Anomaly(
                "a tensor is not where the index says",
                file=file,
                tensor=name,
                expected=f"in {file}",
                got=f"in {entry.file}" if entry else "in no readable file",
                fix=DAMAGED,
            )
    for name, entry in tensors.items():
        if name not in weight_map:
            yield Anomaly("a tensor is not in the index", file=entry.file, tensor=name, fix=DAMAGED, severity="warning")
