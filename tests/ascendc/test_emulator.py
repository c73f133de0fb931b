"""The emulator's checks: each defect is caught by name, the same kernel without it passes, and so do real kernels."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from .conftest import (
    EMULATOR,
    KERNELS,
    SOURCES,
    WARNINGS,
    Emulator,
    EmulatorFault,
    build,
    machine_flags,
    random_activation,
    random_weight,
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
    flags = (*WARNINGS, "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", *machine_flags())
    source = Path(__file__).parent / "defects.cpp"
    return build("defects", [source], flags=flags, include=(EMULATOR,), root=EMULATOR)


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_is_caught_by_name_and_its_absence_is_not(defects: Path, name: str) -> None:
    caught = subprocess.run([defects, name], capture_output=True, text=True)
    assert caught.returncode == 3, caught.stderr
    assert caught.stderr.splitlines()[0] == f"fault {DEFECTS[name]}"
    sound = subprocess.run([defects, name, "sound"], capture_output=True, text=True)
    assert sound.returncode == 0, sound.stderr


def test_one_flag_for_two_stages_is_right_only_where_every_core_is_waited_for(defects: Path) -> None:
    def outcome(*arguments: str) -> str:
        done = subprocess.run([defects, "one_flag_for_two_stages", *arguments], capture_output=True, text=True)
        return done.stderr.splitlines()[0] if done.returncode else "sound"

    assert outcome("defect", "arrivals") == "fault cross-core-race"
    assert outcome("defect", "every-core") == "sound"
    assert outcome("sound", "arrivals") == "sound"
    assert outcome("sound", "every-core") == "sound"


# What is taken out of the project's own kernels, and what the emulator must call it.
MUTATIONS = {
    "decode without its last barrier": (
        "kernels/decode.h",
        "static_cast<int32_t>(kLanes));\n  vector_barrier();\n  and_with_mask",
        "static_cast<int32_t>(kLanes));\n  and_with_mask",
        {"missing-barrier"},
    ),
    "vector cores that do not wait for the products": (
        "kernels/block_linear.cpp",
        "    CrossCoreWaitFlag(kPartial);\n",
        "",
        {"cross-core-race", "uninitialised-read"},
    ),
    "vector cores that announce weights too early": (
        "kernels/block_linear.cpp",
        "CrossCoreSetFlag<kWithinCore, PIPE_MTE3>(static_cast<uint16_t>(kReady + slot))",
        "CrossCoreSetFlag<kWithinCore, PIPE_V>(static_cast<uint16_t>(kReady + slot))",
        {"cross-core-race"},
    ),
    "a slot that is reused while its products are read": (
        "kernels/block_linear.cpp",
        "    order<HardEvent::V_MTE3>(*pipe_);\n  }\n\n  __aicore__ inline void multiply_scales",
        "  }\n\n  __aicore__ inline void multiply_scales",
        {"cross-core-race"},
    ),
    "a cube core that never reports": (
        "kernels/block_linear.cpp",
        "      AscendC::CrossCoreSetFlag<kWithinCore, PIPE_FIX>(kPartial);\n",
        "",
        {"deadlock"},
    ),
    "lanes that are shifted left with their sign": (
        "kernels/decode.h",
        "low.ReinterpretCast<uint16_t>(), lanes.ReinterpretCast<uint16_t>(), static_cast<uint16_t>(8)",
        "low, lanes, static_cast<int16_t>(8)",
        {"signed-shift"},
    ),
    "a NaN that is rounded without a limit": (
        "kernels/activation.h",
        "    Mins(bits, bits, kQuietNan, count);",
        "    ",
        {"integer-overflow"},
    ),
}


@pytest.fixture(scope="module")
def around_the_linear(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that runs kernels, with the linear missing and the other kernels empty; every mutant is linked to it.

    Without optimization or sanitizers, as the mutants: this is about the emulator's own checks.
    """
    others = tmp_path_factory.mktemp("others") / "others.cpp"
    others.write_text(
        '#include "kernel_operator.h"\n#include "tiling.h"\nusing namespace qwen3_fp8_ascend;\nextern "C" {\n'
        "void qwen3_fp8_group_quantize(GM_ADDR, GM_ADDR, GM_ADDR, QuantizeTiling) {}\n"
        "void qwen3_fp8_block_dequantize(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, DequantizeTiling) {}\n"
        "void qwen3_fp8_block_gemv(GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, GM_ADDR, LinearTiling) {}\n}\n"
    )
    run_kernel = Path(__file__).parent / "run_kernel.cpp"
    flags = (*WARNINGS, "-O0", *machine_flags(), "-r", "-nostdlib")  # one object file of both
    return build("around_the_linear.o", [run_kernel, others], flags=flags, include=(EMULATOR, SOURCES))


def mutant(folder: Path, rest: Path, file: str, old: str, new: str, places: int = 1) -> Path:
    """The linear kernel with a text replaced, compiled for the emulator."""
    sources = folder / "ascend"
    shutil.copytree(SOURCES, sources)
    text = (sources / file).read_text()
    assert text.count(old) == places, "the kernel has changed: bring this mutation up to date"
    (sources / file).write_text(text.replace(old, new))
    return build(
        "run_mutant",
        [sources / "kernels" / "block_linear.cpp"],
        flags=(*WARNINGS, "-O0", *machine_flags()),
        include=(EMULATOR, sources),
        root=sources,
        objects=[rest],
    )


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_real_kernel_with_a_step_taken_out_is_caught(name: str, around_the_linear: Path, tmp_path: Path) -> None:
    file, old, new, expected = MUTATIONS[name]
    executable = mutant(tmp_path, around_the_linear, file, old, new)
    # Nine blocks of k are stages of 4, 4 and 1: the last leaves the second vector core without a block to decode.
    weight, x = random_weight((640,), 1152), random_activation(9, 1152, torch.bfloat16)
    x.view(torch.int16)[8, 1151] = 0x7FFF  # a NaN with every bit set
    with pytest.raises(EmulatorFault) as fault:
        Emulator(executable, tmp_path).linear("block_linear", x, weight.tensors, 640, cores=1)
    assert fault.value.name in expected, str(fault.value)


def test_one_ready_flag_for_all_stages_is_caught_where_flags_count_arrivals(
    around_the_linear: Path, tmp_path: Path
) -> None:
    """As the linear was before every stage slot had its own: right as documented, wrong if sets are only counted."""
    flag = "static_cast<uint16_t>(kReady + slot)"
    executable = mutant(tmp_path, around_the_linear, "kernels/block_linear.cpp", flag, "kReady", places=2)
    weight, x = random_weight((640,), 1152), random_activation(9, 1152, torch.bfloat16)
    Emulator(executable, tmp_path, "every-core").linear("block_linear", x, weight.tensors, 640, cores=1)
    with pytest.raises(EmulatorFault) as fault:
        Emulator(executable, tmp_path, "arrivals").linear("block_linear", x, weight.tensors, 640, cores=1)
    assert fault.value.name in {"cross-core-race", "uninitialised-read"}, str(fault.value)


def test_every_kernel_is_compiled_by_these_tests() -> None:
    assert {path.stem for path in (SOURCES / "kernels").glob("*.cpp")} == set(KERNELS)


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
