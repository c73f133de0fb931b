"""The emulator's checks: each defect is caught by name, the same kernel without it passes, and so do real kernels."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.backends import ascendc

from .conftest import (
    EMULATOR,
    KERNELS,
    SANITIZERS,
    SOURCES,
    WARNINGS,
    Emulator,
    EmulatorFault,
    build,
    check_syntax,
    machine_flags,
    random_activation,
    random_weight,
    relative_error,
    sanitized_environment,
)

DEFECTS = {
    "missing_barrier": "missing-barrier",
    "missing_flag": "missing-flag",
    "missing_flag_on_the_way_out": "missing-flag",
    "missing_flag_to_scalar": "missing-flag",
    "missing_flag_before_reuse": "missing-flag",
    "misaligned_copy": "misaligned",
    "misaligned_address": "misaligned",
    "ub_overflow": "ub-overflow",
    "gm_out_of_range": "gm-out-of-range",
    "beyond_the_declared_size": "gm-out-of-range",
    "local_out_of_range": "local-out-of-range",
    "use_after_free": "queue-misuse",
    "no_free_buffer": "queue-misuse",
    "uninitialised_read": "uninitialised-read",
    "event_never_set": "deadlock",
    "event_left_set": "flag-misuse",
    "missing_cross_core_flag": "uninitialised-read",
    "flag_on_the_wrong_pipe": "cross-core-race",
    "deadlock": "deadlock",
    "two_cores_write_the_same": "cross-core-race",
    "flag_of_sync_all": "flag-misuse",
    "reserved_event": "flag-misuse",
    "event_of_the_cube_pipe": "flag-misuse",
    "event_stolen_from_the_cube_pipe": "deadlock",
    "too_many_buffers_before_the_cube": "flag-misuse",
    "signed_left_shift": "signed-shift",
    "overflow_of_a_lane": "integer-overflow",
    "misaligned_narrow_source": "misaligned",
    "misaligned_broadcast": "misaligned",
    "misaligned_maximum": "misaligned",
    "misaligned_scalar": "misaligned",
}


@pytest.fixture(scope="module")
def defects() -> Path:
    source, flags = Path(__file__).parent / "defects.cpp", (*WARNINGS, *SANITIZERS, *machine_flags())
    return build("defects", [source], flags=flags, include=(EMULATOR,), root=EMULATOR)


def run_defect(executable: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([executable, *arguments], capture_output=True, text=True, env=sanitized_environment())


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_caught_by_name_and_its_absence_is_not(defects: Path, name: str) -> None:
    caught = run_defect(defects, name)
    assert caught.returncode == 3, caught.stderr
    assert caught.stderr.splitlines()[0] == f"fault {DEFECTS[name]}"
    sound = run_defect(defects, name, "sound")
    assert sound.returncode == 0, sound.stderr


def test_one_flag_for_two_stages_is_right_only_where_every_core_is_waited_for(defects: Path) -> None:
    def outcome(*arguments: str) -> str:
        done = run_defect(defects, "one_flag_for_two_stages", *arguments)
        return done.stderr.splitlines()[0] if done.returncode else "sound"

    assert outcome("defect", "arrivals") == "fault cross-core-race"
    assert outcome("defect", "every-core") == "sound"
    assert outcome("sound", "arrivals") == "sound"
    assert outcome("sound", "every-core") == "sound"


Edit = tuple[str, str, str]
"""A file of csrc/ascend/kernels, a text in it, and what stands there instead."""

# Faults in the project's own kernels. All are compiled at once, each behind a condition, PLANTED; a run says in its
# environment which of them it has. Later edits find what earlier ones left.
PLANTS: dict[str, tuple[Edit, ...]] = {
    "decode without its last barrier": (
        ("decode.h", "vector_barrier();\n  and_with_mask", "if (!PLANTED) vector_barrier();\n  and_with_mask"),
    ),
    "lanes that are shifted left with their sign": (
        (
            "decode.h",
            "  AscendC::ShiftLeft(",
            "  if (PLANTED) AscendC::ShiftLeft(low, lanes, static_cast<int16_t>(8), static_cast<int32_t>(kLanes));\n"
            "  else AscendC::ShiftLeft(",
        ),
    ),
    "a NaN that is rounded without a limit": (
        ("activation.h", "Mins(bits, bits, kQuietNan, count);", "if (!PLANTED) Mins(bits, bits, kQuietNan, count);"),
    ),
    "vector cores that do not wait for the products": (
        ("pipeline.h", "    CrossCoreWaitFlag(kPartial);", "    if (!PLANTED) CrossCoreWaitFlag(kPartial);"),
    ),
    "vector cores that announce weights too early": (
        (
            "pipeline.h",
            "AscendC::CrossCoreSetFlag<kWithinCore, PIPE_MTE3>(static_cast",
            "(PLANTED ? &AscendC::CrossCoreSetFlag<kWithinCore, PIPE_V>\n"
            "                 : &AscendC::CrossCoreSetFlag<kWithinCore, PIPE_MTE3>)(static_cast",
        ),
    ),
    "a slot that is reused while its products are read": (
        ("pipeline.h", "    order<HardEvent::V_MTE3>(*pipe_);", "    if (!PLANTED) order<HardEvent::V_MTE3>(*pipe_);"),
    ),
    "a cube core that never reports": (
        (
            "pipeline.h",
            "      AscendC::CrossCoreSetFlag<kWithinCore, PIPE_FIX>(kPartial);",
            "      if (!PLANTED) AscendC::CrossCoreSetFlag<kWithinCore, PIPE_FIX>(kPartial);",
        ),
    ),
    "one ready flag for all stages": (
        ("pipeline.h", "(kReady + slot));\n        ++", "(kReady + (PLANTED ? 0 : 1) * slot));\n        ++"),
        ("pipeline.h", "(kReady + slot));\n      load", "(kReady + (PLANTED ? 0 : 1) * slot));\n      load"),
    ),
    "ready flags that begin anew with every tile": (
        (
            "pipeline.h",
            "* slot));\n        ++",
            "* (PLANTED ? stages[slot].k_block / kStageUnits : slot)));\n        ++",
        ),
        ("pipeline.h", "* slot));\n      load", "* (PLANTED ? stage.k_block / kStageUnits : slot)));\n      load"),
    ),
    "the first expert's scales": (
        (
            "pipeline.h",
            "w_scale_[(static_cast<uint64_t>(stage.weights)",
            "w_scale_[(static_cast<uint64_t>(PLANTED ? stage.tile : stage.weights)",
        ),
    ),
    "an end that is off by one": (
        ("groups.h", "end = ends_.GetValue(group)", "end = ends_.GetValue(group) + (PLANTED ? 1 : 0)"),
    ),
    "rows behind an expert's first pass that are lost": (
        ("groups.h", "row_ += pass.rows;", "row_ = PLANTED ? end_ : row_ + pass.rows;"),
    ),
    "a list of ends that is trusted": (("groups.h", "end > last ? last : end", "end > last && !PLANTED ? last : end"),),
}
SOUND = "no fault"


@pytest.fixture(scope="module")
def planted_kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kernels of the pipeline with every fault planted, beside empty ones in place of the others.

    Without optimization or sanitizers: this is about the emulator's own checks.
    """
    folder = tmp_path_factory.mktemp("planted")
    sources = folder / "ascend"
    shutil.copytree(SOURCES, sources)
    for number, edits in enumerate(PLANTS.values()):
        for name, old, new in edits:
            text = (sources / "kernels" / name).read_text()
            assert text.count(old) == 1, f"the kernel has changed: bring this fault up to date: {old!r} in {name}"
            (sources / "kernels" / name).write_text(text.replace(old, new.replace("PLANTED", f"planted({number})")))
    tiling = sources / "tiling.h"
    tiling.write_text(
        "#pragma once\n#include <cstdlib>\ninline bool planted(int fault) {\n"
        '  static const int asked = std::atoi(std::getenv("PLANTED"));\n  return asked == fault;\n}\n'
        + tiling.read_text()
    )
    others = folder / "others.cpp"
    others.write_text(
        '#include "kernel_operator.h"\n#include "tiling.h"\nusing namespace qwen3_fp8_ascend;\nextern "C" {\n'
        "void qwen3_fp8_group_quantize(GM_ADDR, GM_ADDR, GM_ADDR, QuantizeTiling) {}\n"
        "void qwen3_fp8_block_dequantize(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, DequantizeTiling) {}\n"
        "void qwen3_fp8_block_gemv(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, LinearTiling) {}\n}\n"
    )
    kernels = [sources / "kernels" / f"{name}.cpp" for name in ("block_linear", "block_grouped_linear")]
    return build(
        "planted",
        [*kernels, others, Path(__file__).parent / "run_kernel.cpp"],
        flags=(*WARNINGS, "-O0", *machine_flags()),
        include=(EMULATOR, sources),
        root=sources,
    )


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Says which fault the runs of `planted_kernels` have from now on."""
    numbers = {name: number for number, name in enumerate((*PLANTS, SOUND))}
    return lambda name: monkeypatch.setenv("PLANTED", str(numbers[name]))


def dense_outcome(executable: Path, folder: Path, flags: str = "every-core") -> str:
    # Nine blocks of k are stages of 4, 4 and 1: the last leaves the second vector core without a block to decode.
    weight, x = random_weight((640,), 1152), random_activation(9, 1152, torch.bfloat16)
    x.view(torch.int16)[8, 1151] = 0x7FFF  # a NaN with every bit set
    try:
        Emulator(executable, folder, flags).linear("block_linear", x, weight.tensors, 640, cores=1)
    except EmulatorFault as fault:
        return fault.name
    return "sound"


RACES = {"cross-core-race", "uninitialised-read"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SOUND, {"sound"}),
        ("decode without its last barrier", {"missing-barrier"}),
        ("lanes that are shifted left with their sign", {"signed-shift"}),
        ("a NaN that is rounded without a limit", {"integer-overflow"}),
        ("vector cores that do not wait for the products", RACES),
        ("vector cores that announce weights too early", {"cross-core-race"}),
        ("a slot that is reused while its products are read", {"cross-core-race"}),
        ("a cube core that never reports", {"deadlock"}),
    ],
)
def test_a_real_kernel_with_a_step_taken_out_is_caught(
    planted_kernels: Path, plant: Callable[[str], None], tmp_path: Path, name: str, expected: set[str]
) -> None:
    plant(name)
    assert dense_outcome(planted_kernels, tmp_path) in expected


def test_one_ready_flag_for_all_stages_is_caught_where_flags_count_arrivals(
    planted_kernels: Path, plant: Callable[[str], None], tmp_path: Path
) -> None:
    """As the linear was before every stage slot had its own: right as documented, wrong if sets are only counted."""
    plant("one ready flag for all stages")
    assert dense_outcome(planted_kernels, tmp_path, "every-core") == "sound"
    assert dense_outcome(planted_kernels, tmp_path, "arrivals") in RACES


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (SOUND, {"exact"}),
        ("the first expert's scales", {"wrong"}),
        ("an end that is off by one", {"wrong"}),
        ("rows behind an expert's first pass that are lost", {"wrong"}),
        ("a list of ends that is trusted", {"gm-out-of-range"}),
        ("ready flags that begin anew with every tile", RACES),
    ],
)
def test_faults_of_the_grouped_linear_are_caught(
    planted_kernels: Path, plant: Callable[[str], None], tmp_path: Path, name: str, expected: set[str]
) -> None:
    """By the emulator, or by the gate that tests/ascendc/test_grouped_linear.py has for every group."""
    plant(name)
    counts, n, k = (2, 0, 67, 1), 256, 640
    weights = [random_weight((n,), k, seed=group) for group in range(len(counts))]
    packed = ascendc.pack_experts((w.codes for w in weights), torch.stack([w.scale for w in weights]), weights[0].grid)
    x = random_activation(sum(counts), k, torch.float32)
    ends = torch.tensor(list(itertools.accumulate(counts)))
    if name == "a list of ends that is trusted":
        ends[-1] += 1
    try:
        got, _ = Emulator(planted_kernels, tmp_path, "arrivals").grouped_linear(x, packed, ends, n, cores=1)
    except EmulatorFault as fault:
        assert fault.name in expected, str(fault)
        return
    parts = zip(weights, x.split(list(counts)), strict=True)
    oracle = torch.cat([reference.block_linear(r, w.codes, w.scale, compute_dtype=torch.float64) for w, r in parts])
    assert ("exact" if relative_error(got, oracle) <= 1e-6 else "wrong") in expected


def test_every_kernel_is_compiled_by_these_tests() -> None:
    assert {path.stem for path in (SOURCES / "kernels").glob("*.cpp")} == set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_kernel_includes_what_it_needs(kernel: str) -> None:
    """The vendor's compiler takes each alone; the emulator's executable has all in one translation unit."""
    check_syntax([*WARNINGS, f"-I{EMULATOR}", f"-I{SOURCES}", str(SOURCES / "kernels" / f"{kernel}.cpp")])


HALF = """
#include "numeric.h"
#include <cstdio>
int main() {
    for (uint32_t bits = 0; bits < 0x10000; ++bits) {
        const float wide = ascendc_emulator::widen(static_cast<uint16_t>(bits));
        std::fwrite(&wide, sizeof wide, 1, stdout);
    }
    for (float x; std::fread(&x, sizeof x, 1, stdin) == 1;) {
        const half narrow(x);
        std::fwrite(&narrow, sizeof narrow, 1, stdout);
    }
}
"""


@pytest.mark.parametrize("flags", [(), machine_flags()], ids=["software", "this machine's"])
def test_half_is_ieee_s(flags: tuple[str, ...], tmp_path: Path) -> None:
    """Against numpy: every half, each middle between two and its neighbours, and numbers of all sizes."""
    source = tmp_path / "half.cpp"
    source.write_text(HALF)
    executable = build("half", [source], flags=(*WARNINGS, *flags), include=[EMULATOR])
    halves = np.arange(0x10000, dtype=np.uint16).view(np.float16)
    with np.errstate(over="ignore"):
        finite = np.sort(halves[np.isfinite(halves)].astype(np.float32))
        middles = (finite[1:] + finite[:-1]) / 2
        edges = [np.nextafter(middles, np.float32(side)) for side in (-np.inf, np.inf)]
        sizes = np.arange(0, 1 << 32, 65521, dtype=np.uint32).view(np.float32)
        numbers = np.concatenate([middles, *edges, sizes, np.float32([65519.996, 65520, np.inf, -np.inf])])
        expected = numbers.astype(np.float16)
    out = subprocess.run([executable], input=numbers.tobytes(), capture_output=True, check=True).stdout
    widened, narrowed = np.frombuffer(out[: 4 << 16], np.float32), np.frombuffer(out[4 << 16 :], np.float16)
    np.testing.assert_array_equal(widened, halves.astype(np.float32))
    np.testing.assert_array_equal(narrowed, expected)
    numeric = ~np.isnan(expected)
    assert (narrowed.view(np.uint16)[numeric] == expected.view(np.uint16)[numeric]).all(), "the sign of a zero"


def test_kernels_name_nothing_of_the_emulator() -> None:
    """The same sources go to the vendor's compiler."""
    for path in (SOURCES / "kernels").iterdir():
        assert "ascendc_emulator" not in path.read_text(), path


def test_runs_are_repeatable(emulator: Emulator) -> None:
    weight = random_weight((256,), 640)
    x = random_activation(5, 640, torch.bfloat16)
    first, counted = emulator.linear("block_linear", x, weight.tensors, 256, cores=4)
    again, counted_again = emulator.linear("block_linear", x, weight.tensors, 256, cores=4)
    assert first.equal(again)
    assert counted == counted_again
