"""Defects planted in the CPU kernels, one at a time: a sanitizer or a test finds each, and nothing without it.

Only the file that holds a defect is compiled again (tests/support/sanitizers). In the same way the kernels that this
processor would not choose are tested.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from qwen3_fp8_ascend.backends import cpu
from tests.support import sanitizers
from tests.support.cpu_levels import lacking, needs_cpu_backend
from tests.support.sanitizers import ADDRESS, THREAD, Edit, Outcome, Variant, Waiting
from tests.support.sanitizers.judging import assert_clean, lack_of

REASON = sanitizers.missing()
pytestmark = [needs_cpu_backend, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

EXAMPLES = 8
TIMEOUT = 800

BACKEND = "tests/backends/test_cpu_backend.py"
DETERMINISM = "tests/backends/test_cpu_determinism.py"
EXPERTS = "tests/backends/test_cpu_experts.py"
MISUSE = "tests/backends/test_cpu_misuse.py"
THREADS = "tests/backends/test_cpu_threads.py"

LINEAR = "tests/test_ops.py::test_linear[{}-cpu]"
EXPERTS_THREADS = f"{EXPERTS}::test_bits_do_not_depend_on_the_number_of_threads[avx2-w8a8-torch.bfloat16-60]"
TWO_THREADS = f"{THREADS}::test_several_python_threads_share_a_weight[avx2]"

FIND_CORES = "static const Cores found = find_cores();"


def of_cores(name: str) -> Edit:
    """Any processor is taken for one with these cores."""
    return Edit("isa.cpp", FIND_CORES, f"(void)find_cores;\n  static const Cores found = Cores::{name};")


# What a test's own comparison finds needs no sanitizer.
COMPARED = ADDRESS.without("amx.cpp", "avx2.cpp", "avx512.cpp", "avx512f.cpp")

DEFECTS: dict[str, tuple[Variant, Edit, str, str]] = {
    "a read behind the codes": (
        ADDRESS,
        Edit("portable.cpp", "quad < (length + 3) / 4; ++quad", "quad < (length + 3) / 4 + 1; ++quad"),
        f"{BACKEND}::test_linear_of_ragged_edges[portable-widths3-390-6-w8a16]",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a write behind the result": (
        ADDRESS,
        Edit("linear.cpp", "group_value, codes + row * k + start);", "group_value, codes + row * k + start + 1);"),
        f"{BACKEND}::test_quantizes_halfway_cases[avx2-dtype0]",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a tile load behind the activations": (
        ADDRESS,
        Edit(
            "prepare.cpp",
            "rows < kTileRows ? rows : round_up(rows, kTileRows)",
            "rows",
        ),
        f"{BACKEND}::test_linear_of_ragged_edges[amx-widths0-1-19-w8a16]",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a signed overflow": (
        ADDRESS,
        Edit(
            "operators.cpp",
            "const std::int64_t blocks = ceil_div(k, block_k);",
            "const std::int64_t blocks = (k + block_k - 1) / block_k;",
        ),
        f"{MISUSE}::test_sizes_that_overflow",
        "runtime error: signed integer overflow",
    ),
    "a misaligned load": (
        ADDRESS,
        Edit(
            "pack.cpp",
            "std::uint32_t quad;\n  std::memcpy(&quad, row, sizeof quad);\n  return quad;",
            "return *reinterpret_cast<const std::uint32_t*>(row);",
        ),
        f"{MISUSE}::test_addresses_need_not_be_multiples_of_anything",
        "runtime error: load of misaligned address",
    ),
    "scratch memory shared by the threads of a call": (
        THREAD,
        Edit("linear.cpp", "thread_local Scratch kernel_memory;", "Scratch kernel_memory;"),
        LINEAR.format("w8a8"),
        "ThreadSanitizer: data race",
    ),
    "scratch memory shared by callers": (
        THREAD,
        Edit("linear.cpp", "thread_local Scratch prepared_memory;", "Scratch prepared_memory;"),
        TWO_THREADS,
        "ThreadSanitizer: data race",
    ),
    "a sum without its atomic": (
        THREAD,
        Edit(
            "read.cpp",
            "all.fetch_xor(sum, std::memory_order_relaxed);",
            "reinterpret_cast<std::uint64_t&>(all) ^= sum;",
        ),
        f"{MISUSE}::test_good_arguments_are_accepted[cpu_read]",
        "ThreadSanitizer: data race",
    ),
    "rows of experts beyond their share": (
        ADDRESS,
        Edit("expert_shares.cpp", "capacity_of(share.rows * terms)", "capacity_of(share.rows * terms) - 1"),
        f"{EXPERTS}::test_layer_of_any_shape[avx2-w8a8]",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "panels of experts that nobody looked at": (
        ADDRESS,
        Edit("expert_operators.cpp", '    require_same_panels(w2, expert, "w2_");\n', ""),
        f"{MISUSE}::test_panel_tables_of_experts_that_lie[{2**31 - 1}-0-w2_panels]",
        "AddressSanitizer",
    ),
    "memory of a task shared by the threads of a layer": (
        THREAD,
        Edit("experts.cpp", "thread_local Scratch task_memory;", "Scratch task_memory;"),
        EXPERTS_THREADS,
        "ThreadSanitizer: data race",
    ),
    "a task taken by two threads": (
        THREAD,
        Edit(
            "expert_shares.h", "next.fetch_add(1, std::memory_order_relaxed)", "reinterpret_cast<std::int64_t&>(next)++"
        ),
        EXPERTS_THREADS,
        "ThreadSanitizer: data race",
    ),
    "sums of few rows in another order": (
        COMPARED,
        Edit(
            "linear_avx512.h",
            "top.pair0, x0);\n        partial[r][p][1] = dot_pair(partial[r][p][1], bottom.pair0, x0);\n"
            "        partial[r][p][0] = dot_pair(partial[r][p][0], top.pair1, x1);",
            "top.pair1, x1);\n        partial[r][p][1] = dot_pair(partial[r][p][1], bottom.pair0, x0);\n"
            "        partial[r][p][0] = dot_pair(partial[r][p][0], top.pair0, x0);",
        ),
        f"{DETERMINISM}::test_bits_are_the_same_in_batches_of_any_size[avx512-w8a8-torch.bfloat16]",
        "AssertionError: alone and among ",
    ),
    "subnormal numbers where a program has them taken for zero": (
        COMPARED.with_edits(of_cores("other")),
        Edit("linear_fma.h", "  const SubnormalsKept kept;\n", ""),
        f"{DETERMINISM}::test_bits_are_the_same_when_subnormal_numbers_are_taken_for_zero[avx2]",
        "AssertionError",
    ),
    "sums that become subnormal": (
        COMPARED.with_edits(of_cores("other")),
        Edit(
            "subnormals_fma.h", "return most < bf16_power(62) && least >= bf16_power(-77) - 1;", "return most < 0x7f80;"
        ),
        f"{DETERMINISM}::test_numbers_far_apart_have_the_bits_of_a_batch[avx2-torch.bfloat16]",
        "AssertionError: 1 rows",
    ),
    "the scales of two panels in another order": (
        COMPARED,
        Edit(
            "amx.cpp",
            "_mm512_fmadd_ps(scaled, w_scale_[half / 2], _mm512_load_ps(sums_ + at))",
            "Panels == 1 ? _mm512_fmadd_ps(scaled, w_scale_[half / 2], _mm512_load_ps(sums_ + at)) : _mm512_fmadd_ps("
            "_mm512_mul_ps(_mm512_load_ps(partial_ + at), w_scale_[half / 2]), row_scale, _mm512_load_ps(sums_ + at))",
        ),
        f"{DETERMINISM}::test_bits_are_the_same_in_batches_of_any_size[amx-w8a8-torch.float32]",
        "AssertionError: alone and among 17",
    ),
}
"""Each with a test that passes without it, and what the sanitizer or the test must say with it."""


Run = Callable[[Variant, list[str], Path], Outcome]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Builds a variant and runs tests against it; those of one sanitizer in forks of one process."""
    with contextlib.ExitStack() as ended:
        waiting: dict[str, Waiting] = {}

        def of(variant: Variant, tests: list[str], folder: Path) -> Outcome:
            library = sanitizers.build(variant)
            if variant.runtime not in waiting:
                waiting[variant.runtime] = Waiting(variant)
                ended.callback(waiting[variant.runtime].close)
            process = waiting[variant.runtime]
            return process.run_tests(library, tests, folder, examples=EXAMPLES, capped=False, timeout=TIMEOUT)

        yield of


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_are_found(run: Run, defect: str, tmp_path: Path) -> None:
    variant, edit, test, said = DEFECTS[defect]
    outcome = run(variant.with_edits(edit), [test], tmp_path)
    if reason := lack_of(outcome):
        pytest.skip(f"not looked for: its test is skipped here, since {reason}")
    assert outcome.status != 0 and said in outcome.output, outcome.output[-6000:]


@pytest.mark.parametrize("variant", [ADDRESS, THREAD], ids=lambda variant: variant.name)
def test_planted_defects_are_all_that_fails(run: Run, variant: Variant, tmp_path: Path) -> None:
    tests = list(dict.fromkeys(test for which, _, test, _ in DEFECTS.values() if which.name == variant.name))
    assert_clean(run(variant, tests, tmp_path), len(tests))


OF_A_TABLE = (
    "decodes_every or nan_codes or ragged_edges and (widths2 or widths3) and not ue8m0 or layer_of_any_shape"
    " or batches_of_any_size and bfloat16 or taken_for_zero or far_apart and bfloat16"
)


@pytest.mark.skipif(lacking("avx2") is not None, reason=str(lacking("avx2")))
@pytest.mark.parametrize("cores", ["intel", "zen4", "other"])
def test_kernels_for_other_cores(run: Run, cores: str, tmp_path: Path) -> None:
    """A processor takes the tables of kernels for its own cores, and leaves those for others."""
    tests = [BACKEND, DETERMINISM, EXPERTS, "-k", f"(avx2 or avx512) and not avx512f and ({OF_A_TABLE})"]
    assert_clean(run(ADDRESS.with_edits(of_cores(cores)), tests, tmp_path), 30)


NO_AMX = Edit("isa.cpp", "(void)amx;\n  return Isa::amx;", "(void)amx;")
"""After the edits of a variant, which emulate AMX."""


@pytest.mark.parametrize("cores", ["intel", "other"])
def test_without_amx_a_processor_takes_what_multiplies_most(run: Run, cores: str, tmp_path: Path) -> None:
    """Intel's cores do more with fp32 numbers than with pairs of bf16, and do not get to the level that has those."""
    best = {"intel": "avx512f", "other": "avx512"}[cores]
    if reason := lacking(best):
        pytest.skip(reason)
    outcome = run(ADDRESS.with_edits(NO_AMX, of_cores(cores)), [f"{BACKEND}::test_decodes_every_code"], tmp_path)
    assert_clean(outcome, 25)
    assert outcome.report is not None
    skipped = " ".join(outcome.report["skipped"].values())
    lacks = [name for name in cpu.ISAS if f"{name} is not here" in skipped]
    assert lacks == list(cpu.ISAS[cpu.ISAS.index(best) + 1 :])
