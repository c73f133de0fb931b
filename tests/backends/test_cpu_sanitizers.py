"""The CPU backend's tests again, with the library under AddressSanitizer, UBSan and ThreadSanitizer; planted defects.

Builds are kept in .cache/sanitizers (tests/support/sanitizers). AMX is emulated there, so its kernels run on every
processor with AVX-512.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from qwen3_fp8_ascend.backends import cpu
from tests.support import sanitizers
from tests.support.cpu_levels import is_lack, needs_cpu_backend
from tests.support.sanitizers import ADDRESS, THREAD, Edit, Outcome, Variant

REASON = sanitizers.missing()
pytestmark = [needs_cpu_backend, pytest.mark.skipif(REASON is not None, reason=str(REASON))]

BACKEND = "tests/backends/test_cpu_backend.py"
DETERMINISM = "tests/backends/test_cpu_determinism.py"
EXPERTS = "tests/backends/test_cpu_experts.py"
PROPERTIES = (BACKEND, "tests/test_ops.py", DETERMINISM, EXPERTS)
MISUSE = "tests/backends/test_cpu_misuse.py"
ODD_CALLS = "tests/backends/test_cpu_odd_calls.py"
THREADS = "tests/backends/test_cpu_threads.py"

OURS = "(cpu or three_dimensions)"
NOT_OF_THE_KERNELS = "not document and not compiles_whole and not environment_variable and not only_torch"
# Everything that needs no more than a second: what a sanitizer looks for shows at any size.
SHORT = "not depend_neither and not hundred_thousand and not merged_ragged and not several_python and not 30b_a3b"
SHORT += " and not exponential"
# The emulated AMX is the only level here whose bits change with the path.
SHORT += " and (amx or not stated_limit)"
# ThreadSanitizer cannot follow threads that are started after a fork.
WITHOUT_FORKS = "not fork"

SHORT_EXAMPLES, LONG_EXAMPLES = 8, 100


def select(*parts: str) -> list[str]:
    return ["-k", " and ".join(parts)]


def run(
    variant: Variant,
    arguments: Sequence[str],
    folder: Path,
    examples: int,
    timeout: float = 800,
    *,
    capped: bool = True,
) -> Outcome:
    library = sanitizers.build(variant)
    return sanitizers.run_tests(variant, library, arguments, folder, examples=examples, capped=capped, timeout=timeout)


def assert_clean(outcome: Outcome, least: int) -> None:
    """Everything that this machine can run has passed, and at least `least` tests were chosen.

    How many of them are skipped depends on the machine's instruction sets, so it is only asked why they were.
    """
    assert outcome.status == 0, outcome.output[-8000:]
    report = outcome.report
    assert report is not None
    assert report["sanitized_library_loaded"] and not report["other_libraries"]
    assert report["failed"] == 0 and report["passed"] > 0, outcome.output[-3000:]
    assert [reason for reason in report["skipped"].values() if not is_lack(reason)] == []
    assert report["passed"] + len(report["skipped"]) >= least, outcome.output[-3000:]
    print(f"{report['passed']} passed, {len(report['skipped'])} skipped, {outcome.seconds:.0f} s")


def assert_threads_met(outcome: Outcome, least: int) -> None:
    """On average a test that ran cut its work into parts for several threads at least `least` times."""
    assert outcome.report is not None
    regions, ran = outcome.report["threaded_regions"], outcome.report["passed"]
    print(f"{regions} regions in two or more threads")
    assert regions >= least * ran


def lack_of(outcome: Outcome) -> str | None:
    """Why the one test of a run was skipped, if this machine lacks what it needs; None if it ran."""
    report = outcome.report
    if outcome.status != 0 or report is None or report["passed"] or report["failed"]:
        return None
    [reason] = report["skipped"].values()
    return reason if is_lack(reason) else None


@pytest.mark.timeout(900)
def test_short_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    arguments = [*PROPERTIES, MISUSE, ODD_CALLS, THREADS, *select(OURS, NOT_OF_THE_KERNELS, SHORT)]
    assert_clean(run(ADDRESS, arguments, tmp_path, SHORT_EXAMPLES), 600)


@pytest.mark.timeout(900)
def test_short_under_thread_sanitizer(tmp_path: Path) -> None:
    threaded = "(test_linear or any_shape or several_python or instruction_set_may or depend_on_its_batch)"
    small = "not other_block_sizes and not ragged and not portable-3 and not portable-w8a16"
    arguments = [*PROPERTIES, THREADS, *select(OURS, NOT_OF_THE_KERNELS, WITHOUT_FORKS, threaded, small)]
    outcome = run(THREAD, arguments, tmp_path, SHORT_EXAMPLES)
    assert_clean(outcome, 25)
    assert_threads_met(outcome, 10)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", [ADDRESS, ADDRESS.optimized()], ids=lambda variant: variant.name)
def test_long_under_address_and_undefined_behaviour_sanitizers(variant: Variant, tmp_path: Path) -> None:
    arguments = [*PROPERTIES, MISUSE, ODD_CALLS, THREADS, *select(OURS, NOT_OF_THE_KERNELS)]
    assert_clean(run(variant, arguments, tmp_path, LONG_EXAMPLES, 3500), 1000)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("variant", [THREAD, THREAD.optimized()], ids=lambda variant: variant.name)
def test_long_under_thread_sanitizer(variant: Variant, tmp_path: Path) -> None:
    arguments = [*PROPERTIES, MISUSE, ODD_CALLS, THREADS, *select(OURS, NOT_OF_THE_KERNELS, WITHOUT_FORKS)]
    outcome = run(variant, arguments, tmp_path, LONG_EXAMPLES, 3500)
    assert_clean(outcome, 1000)
    assert_threads_met(outcome, 10)


LINEAR = "tests/test_ops.py::test_linear[{}-cpu]"
EXPERTS_THREADS = f"{EXPERTS}::test_bits_do_not_depend_on_the_number_of_threads[avx2-w8a8-torch.bfloat16]"
TWO_THREADS = f"{THREADS}::test_several_python_threads_share_a_weight[avx2]"

DEFECTS: dict[str, tuple[Variant, Edit, str, str]] = {
    "a read behind the codes": (
        ADDRESS,
        Edit("portable.cpp", "quad < (length + 3) / 4; ++quad", "quad < (length + 3) / 4 + 1; ++quad"),
        f"{BACKEND}::test_linear_of_ragged_edges[portable-widths3-1030-6-w8a16]",
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
        Edit("experts.cpp", "capacity_of(share.rows * terms)", "capacity_of(share.rows * terms) - 1"),
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
        Edit("experts.cpp", "next.fetch_add(1, std::memory_order_relaxed)", "reinterpret_cast<std::int64_t&>(next)++"),
        EXPERTS_THREADS,
        "ThreadSanitizer: data race",
    ),
    "a path chosen for each expert": (
        ADDRESS,
        Edit("experts.cpp", "    if (!kernels.paths_agree) return batch_path;\n", ""),
        f"{EXPERTS}::test_bits_change_at_the_stated_limit_and_nowhere_else[amx-w8a8]",
        "AssertionError",
    ),
    "a path chosen for each pass of a batch": (
        ADDRESS,
        Edit(
            "linear.cpp",
            "linear_pass(kernels, path, part,",
            "linear_pass(kernels, part.rows * terms <= kernels.register_rows ? Path::registers : path, part,",
        ),
        f"{DETERMINISM}::test_bits_change_at_the_stated_limit_and_nowhere_else[amx-w8a8-torch.bfloat16]",
        "AssertionError: first and last row of 513",
    ),
}
"""Each with a test that passes without it, and what the sanitizer or the test must say with it."""


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_are_found(defect: str, tmp_path: Path) -> None:
    variant, edit, test, said = DEFECTS[defect]
    outcome = run(variant.with_edits(edit), [test], tmp_path, SHORT_EXAMPLES, capped=False)
    if reason := lack_of(outcome):
        pytest.skip(f"not looked for: its test is skipped here, since {reason}")
    assert outcome.status != 0 and said in outcome.output, outcome.output[-6000:]


def test_planted_defects_are_all_that_fails(tmp_path: Path) -> None:
    for variant in (ADDRESS, THREAD):
        tests = list(dict.fromkeys(test for which, _, test, _ in DEFECTS.values() if which is variant))
        assert_clean(run(variant, tests, tmp_path, SHORT_EXAMPLES, capped=False), len(tests))


def test_no_level_leaves_code_to_another() -> None:
    """Objects are made for different processors: a function that two of them share could be the wrong one's."""
    paths = [path for path in sanitizers.objects(ADDRESS) if path.stem.rpartition("-")[2] in cpu.ISAS]
    assert len(paths) == len(cpu.ISAS)
    for path in paths:
        assert not sanitizers.shared_symbols(path)
