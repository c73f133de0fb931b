"""The CPU backend's tests again, with the library under AddressSanitizer, UBSan and ThreadSanitizer.

Builds are kept in .cache/sanitizers (tests/support/sanitizers). AMX is emulated there, so its kernels run on every
processor with AVX-512.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from qwen3_fp8_ascend.backends import cpu
from tests.support import sanitizers
from tests.support.cpu_levels import needs_cpu_backend
from tests.support.sanitizers import ADDRESS, THREAD, Outcome, Variant
from tests.support.sanitizers.judging import assert_clean

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
NOT_OF_THE_KERNELS += " and not gradient"
# What a sanitizer looks for shows at any size, and with any numbers: of sizes those beside every edge, of numbers the
# largest and the smallest, and of what is quantized before a kernel sees it one of each number of terms.
SHORT = "not depend_neither and not hundred_thousand and not merged_ragged and not several_python and not 30b_a3b"
SHORT += " and not agree_with_their_fakes"
SHORT += " and not exponential and not (batch_and_threads and ue8m0) and (not magnitudes or -130- or 100-)"
SHORT += " and (not ragged_edges or 1-1- or 1-19- or 5-1- or 5-40- or 131-6- or 131-19- or 390-2- or 390-40-)"
SHORT += " and (not many_tokens or w8a8-torch.bfloat16 or w8a16-torch.float32)"
# How work is shared by threads is the same code for every level, and that bits are right is asked without a sanitizer.
SHORT += " and (not number_of_threads or avx2-w8a8-torch.bfloat16 or not portable and not -60 and w8a8-torch.bfloat16)"
SHORT += " and (not row_does_not_depend and not of_one_thread or not portable)"
SHORT += " and not silu_has and not every_quotient"
# AMX has the most ways to take a batch; the planted defects run W8A8.
SHORT += " and (not batches_of_any_size or amx-w8a16-torch.float32 or test_cpu_experts and amx-w8a16)"
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
) -> Outcome:
    library = sanitizers.build(variant)
    return sanitizers.run_tests(variant, library, arguments, folder, examples=examples, capped=True, timeout=timeout)


def assert_threads_met(outcome: Outcome, least: int) -> None:
    """On average a test that ran cut its work into parts for several threads at least `least` times."""
    assert outcome.report is not None
    regions, ran = outcome.report["threaded_regions"], outcome.report["passed"]
    print(f"{regions} regions in two or more threads")
    assert regions >= least * ran


@pytest.mark.timeout(900)
def test_short_under_address_and_undefined_behaviour_sanitizers(tmp_path: Path) -> None:
    arguments = [*PROPERTIES, MISUSE, ODD_CALLS, THREADS, *select(OURS, NOT_OF_THE_KERNELS, SHORT)]
    assert_clean(run(ADDRESS, arguments, tmp_path, SHORT_EXAMPLES), 900)


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


def test_no_level_leaves_code_to_another() -> None:
    """Objects are made for different processors: a function that two of them share could be the wrong one's."""
    paths = [path for path in sanitizers.objects(ADDRESS) if path.stem.rpartition("-")[2] in cpu.ISAS]
    assert len(paths) == len(cpu.ISAS)
    for path in paths:
        assert not sanitizers.shared_symbols(path)
