#!/usr/bin/env python3
"""Prepare a slice of Qwen3-8B: all its shapes, few layers, random weights; as bf16 and as block FP8.

For what needs the real shapes and not the real weights, where no model hub can be reached. The tokenizer has a token
for each byte.

Usage: python scripts/prepare_slice_model.py [--layers 2] [--output .cache/models]
Writes OUTPUT/Qwen3-8B-slice-N-bf16 (2.5 GB and 0.39 GB a layer) and OUTPUT/Qwen3-8B-slice-N.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.testing.models import QWEN3_8B, write_qwen3


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, choices=range(1, 37), default=2, metavar="N", help="1 to 36 layers")
    parser.add_argument("--output", type=Path, default=Path(".cache/models"), help="folder for both models")
    arguments = parser.parse_args()
    fp8: Path = arguments.output / f"Qwen3-8B-slice-{arguments.layers}"
    bf16 = fp8.with_name(f"{fp8.name}-bf16")
    try:
        if not bf16.is_dir():
            arguments.output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".prepare-", dir=arguments.output) as scratch:
                write_qwen3(Path(scratch) / "bf16", **QWEN3_8B | {"num_hidden_layers": arguments.layers})
                (Path(scratch) / "bf16").rename(bf16)
        if not fp8.is_dir():
            quantize_checkpoint(bf16, fp8, progress=sys.stderr.isatty())
    except BlockFp8Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(fp8)
    return 0


if __name__ == "__main__":
    sys.exit(main())
