"""Copies this project's kernels for Atlas A2 and A3 into a checkout of vLLM-Ascend, under its names.

    python docs/upstream/a2_a3/copy_kernels.py CHECKOUT

The kernels are taken as they are: names change, the macros that tell CANN's versions apart become what csrc/kernels
there uses, and what the pull request does not call is left out.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

SOURCES = Path(__file__).resolve().parents[3] / "csrc" / "ascend"
TARGET = Path("csrc/kernels/block_fp8")
KERNELS = ("linear", "grouped_linear", "dequantize")
HEADERS = ("activation", "decode", "finish", "groups", "pipeline", "prepare", "vector_ops", "work")

OPERATORS_LEFT_OUT = ("group_quantize", "block_dequantize", "block_gemv")
"""What nothing calls there: activations stay as they are, and of `block_dequantize` the form with `out` is enough."""

FUNCTIONS_LEFT_OUT = (
    *OPERATORS_LEFT_OUT,
    *("group_quantize_meta", "block_dequantize_meta", "groups_of"),
    *("launch_group_quantize", "launch_block_gemv", "plan_quantize", "quantize_blocks", "plan_gemv"),
)

NAMES = (
    ("TORCH_LIBRARY_FRAGMENT(qwen3_fp8_ascend,", "TORCH_LIBRARY_FRAGMENT(_C_ascend,"),
    ("TORCH_LIBRARY_IMPL(qwen3_fp8_ascend,", "TORCH_LIBRARY_IMPL(_C_ascend,"),
    ("torch.ops.qwen3_fp8_ascend.ascendc_", "torch.ops._C_ascend.block_fp8_"),
    ("`pack` of backends/ascendc.py", "methods/w8a8/fp8_block_fused.py"),
    ('#include "kernel_kind.h"\n', ""),
    ("QWEN3_FP8_MIXED_KERNEL", "__global__ __aicore__"),
    ("QWEN3_FP8_VECTOR_KERNEL", "__global__ __aicore__"),
    ("QWEN3_FP8_KERNEL_KIND(", "KERNEL_TASK_TYPE_DEFAULT("),
    ("qwen3_fp8_block_", "block_fp8_"),
    ("qwen3_fp8_ascend", "block_fp8"),
    ("ascendc_block_", "block_fp8_"),
    ("ascendc: ", "block_fp8: "),
    ("at::empty_symint({", "at::empty_symint(c10::SymDimVector{"),  # as tools/check_symbolic_meta.py wants it
    ("constexpr uint32_t kMaxGemvColumns = 16384;  // k that block_gemv keeps on chip\n", ""),
    (" from any row on (block_gemv: 1)", " from any row on"),
    ("AI cores, or vector cores (block_gemv)", "AI cores"),
    (': see docs/ascendc.md, "hand-over"', ""),
    (", which is docs/ascendc.md's table)", ")"),
    (" Needs torch alone, so it is also built by the tests.", ""),
    ("launch_*.asc do it on an NPU, the tests' emulator on the host.", "csrc/kernels/block_fp8_*.cpp do it."),
)

HEAD = """/*
 * This file is a part of the vllm-ascend project.
 *
 * Licensed under the Apache License, Version 2.0 (the "License");
 * you may not use this file except in compliance with the License.
 * You may obtain a copy of the License at
 *
 * http://www.apache.org/licenses/LICENSE-2.0
 *
 * Unless required by applicable law or agreed to in writing, software
 * distributed under the License is distributed on an "AS IS" BASIS,
 * WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
 * See the License for the specific language governing permissions and
 * limitations under the License.
 */
"""

ONLY_WITH_KERNELS = "#ifdef VLLM_ENABLE_ATB_AND_DIRECT_KERNELS\n\n{}\n#endif  // VLLM_ENABLE_ATB_AND_DIRECT_KERNELS\n"
"""csrc/*.cpp is compiled for every chip there, csrc/kernels for those with these cores."""


def without_unused(text: str) -> str:
    """C++ as clang-format leaves it, without what is left out."""
    body = r"(?:[^;{]*\{[^\n]*\}\n|[^;{]*?\{\n.*?^\}\n)\n?"  # on one line, or up to a brace that begins one
    for name in FUNCTIONS_LEFT_OUT:
        text = re.sub(rf"(?:^//[^\n]*\n)*^[^\s/#][^\n;{{(]* {name}\({body}", "", text, flags=re.M | re.S)
        text = re.sub(rf"^\S[^\n;{{(]* {name}\([^;{{]*\);\n", "", text, flags=re.M)
    for name in OPERATORS_LEFT_OUT:
        text = re.sub(rf'^  m\.(?:def|impl)\(\s*"ascendc_{name}[("].*?\);\n', "", text, flags=re.M | re.S)
    return text.replace("\n\n#include <tuple>\n", "\n").replace("#include <tuple>\n", "")


def renamed(text: str) -> str:
    for ours, theirs in NAMES:
        text = text.replace(ours, theirs)
    return text


def copied(source: str) -> str:
    return renamed(without_unused((SOURCES / source).read_text()))


def files() -> dict[Path, str]:
    """What is written, by its place in the checkout."""
    out = {TARGET / "tiling.h": copied("tiling.h")}
    for name in (*(f"{header}.h" for header in HEADERS), *(f"block_{kernel}.cpp" for kernel in KERNELS)):
        out[TARGET / "kernels" / name] = copied(f"kernels/{name}")
    for name in ("launch.h", "plan.h"):
        out[TARGET / "host" / name] = copied(f"host/{name}")
    for kernel in KERNELS:
        launch = copied(f"host/launch_block_{kernel}.asc").replace('"../kernels/', '"block_fp8/kernels/')
        out[TARGET.parent / f"block_fp8_{kernel}.cpp"] = launch.replace('"launch.h"', '"block_fp8/host/launch.h"')
    for name, theirs in (("torch_schema", "block_fp8_meta"), ("torch_ops", "block_fp8_ops")):
        text = copied(f"host/{name}.cpp")
        for ours, place in (("../", ""), ("launch.h", "host/launch.h"), ("plan.h", "host/plan.h")):
            text = text.replace(f'#include "{ours}', f'#include "kernels/block_fp8/{place}')
        out[Path(f"csrc/{theirs}.cpp")] = ONLY_WITH_KERNELS.format(text)
    return {place: HEAD + text for place, text in out.items()}


def main() -> int:
    checkout = Path(sys.argv[1])
    if not (checkout / "csrc" / "kernels").is_dir():
        print(f"{checkout} is no checkout of vLLM-Ascend: it has no folder csrc/kernels", file=sys.stderr)
        return 2
    for place, text in files().items():
        target = checkout / place
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
