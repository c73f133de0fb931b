"""The safetensors format once more, in plain Python: what an accepted header must mean to others."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from qwen3_fp8_ascend.checkpoints.weight_file import DTYPE_BITS, METADATA


def tensors_of(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Dtype and shape of every tensor of a small file.

    Raises:
        AssertionError: the file is not what the format says.
    """
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    document = json.loads(content[8 : 8 + length].decode(), object_pairs_hook=_unique)
    metadata = document.pop(METADATA, {})
    assert isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()), "bad metadata"
    out, position = {}, 0
    for name, entry in sorted(document.items(), key=lambda item: item[1]["data_offsets"]):
        assert entry.keys() == {"dtype", "shape", "data_offsets"}, f"keys of {name!a}"
        begin, end = entry["data_offsets"]
        assert begin == position, f"a hole or an overlap before {name!a}"
        assert math.prod(entry["shape"]) * DTYPE_BITS[entry["dtype"]] == 8 * (end - begin), f"the size of {name!a}"
        out[name] = (entry["dtype"], tuple(entry["shape"]))
        position = end
    assert 8 + length + position == len(content), "bytes that belong to no tensor"
    return out


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    assert len(set(keys)) == len(keys), "a key stands twice"
    return dict(pairs)
