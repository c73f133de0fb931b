"""A pytest plugin: what `make test-aarch64` runs of the tests of the CPU backend, on the level that a processor is for.

Of each kind of test all, or of those with many sizes a few. Under qemu it takes longer to collect all tests for all
levels, and to leave most of them out, than to run these: what is not in the table is not collected.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from types import ModuleType
from unittest.mock import patch

import pytest
from hypothesis import is_hypothesis_test, settings

LEVEL = {"max": "neon_bf16", "neoverse-n1": "neon"}[os.environ["AARCH64_PROCESSOR"]]

# What torch knows of tensors without numbers, for FakeTensors alone: a third of its import.
sys.modules["torch._meta_registrations"] = ModuleType("torch._meta_registrations")

EXAMPLES = 12
"""So many at most of a test with drawn ones; they are drawn in the same order, and the long form has all."""

ALL = ".*"
SHORT = {
    "test_decodes_every_code": ALL,
    "test_nan_codes_poison_their_row_only": ALL,
    "test_dequantizes_every_code": ALL,
    "test_quantizes_any_bits": ALL,
    "test_quantizes_halfway_cases": ALL,
    "test_linear_of_merged_ragged_shards": "dtype0-9-.*|dtype2-1-w8a16|dtype2-9-w8a8.*",
    "test_linear_of_ragged_edges": "widths0-1-19-.*|widths1-5-1-.*|widths2-131-(6|19)-.*|widths3-390-40-.*",
    "test_linear_of_other_block_sizes": "block0-33|block1-1|block2-5|block3-33",
    "test_bias_is_added_to_the_fp32_sums": "(1|9)-.*",
    "test_infinities_and_nan_go_where_the_reference_sends_them": ALL,
    "test_magnitudes_to_the_ends_of_fp32": ALL,
    "test_batch_and_threads_do_not_change_bits": "w8a8",
    "test_rows_may_lie_apart": ALL,
    "test_empty_sizes": ALL,
    # Layers of experts: the oracle, stages and batches in W8A8.
    "test_layer_of_any_shape": "w8a8",
    "test_layer_is_its_parts_bit_for_bit": "w8a8",
    "test_a_token_does_not_depend_on_its_batch": "w8a8",
    "test_silu_has_the_same_bits_on_every_instruction_set": ALL,
    "test_nan_codes_poison_their_own_expert_alone": ALL,
}
"""Tests by name, and which of their parameters behind the level."""
if LEVEL == "neon":  # which rows of which expert a thread takes is one source; bfmmla is emulated in software
    SHORT["test_bits_do_not_depend_on_the_number_of_threads"] = "w8a8-torch.bfloat16-7"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """While tests are imported, which make an item for each level, there is one."""
    from qwen3_fp8_ascend.backends import cpu
    from tests.support import cpu_levels

    cpu_levels.ISAS[:] = [level for level in cpu_levels.ISAS if level.values == (LEVEL,)]
    with patch.object(cpu, "ISAS", (LEVEL,)):
        return (yield)


def pytest_pycollect_makeitem(collector: pytest.Collector, name: str) -> list[pytest.Item] | None:
    ours = _of_processor(collector) or not name.startswith("test_") or name in SHORT
    return None if ours else []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = {item: None for item in items if _of_processor(item) or _is_short(item)}
    lost = SHORT.keys() - {getattr(item, "originalname", None) for item in chosen}
    if lost:
        raise pytest.UsageError(f"no such tests on {LEVEL}: {', '.join(sorted(lost))}")
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = list(chosen)
    functions = {item.function for item in chosen if isinstance(item, pytest.Function)}
    for function in filter(is_hypothesis_test, functions):
        given = function._hypothesis_internal_use_settings
        few = settings(given, max_examples=min(given.max_examples, EXAMPLES))
        function._hypothesis_internal_use_settings = few  # the decorator refuses to be used twice


def _of_processor(node: pytest.Collector | pytest.Item) -> bool:
    return "test_processor.py" in node.nodeid


def _is_short(item: pytest.Item) -> bool:
    name, _, parameters = item.name.rstrip("]").partition("[")
    match = re.fullmatch(rf"{LEVEL}(?:-(.*))?", parameters)
    return match is not None and re.fullmatch(SHORT[name], match[1] or "") is not None
