import json
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import MAX_IGNORED, Activation, BlockFp8Config, BlockGrid, BlockSize, scale_shape
from tests.support.own_time import within

QWEN3 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def test_qwen3_config() -> None:
    config = BlockFp8Config.from_dict(QWEN3)
    assert config == BlockFp8Config(BlockSize(128, 128), ())
    assert config.to_dict() == QWEN3


def test_both_spellings_of_ignored_layers() -> None:
    config = BlockFp8Config.from_dict(QWEN3 | {"ignored_layers": ["a"], "modules_to_not_convert": ["a", "lm_head"]})
    assert config.ignored == ("a", "lm_head")
    assert BlockFp8Config.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"quant_method": "awq"}, "quant_method"),
        ({"weight_block_size": None}, "weight_block_size"),
        ({"weight_block_size": [128]}, "weight_block_size"),
        ({"weight_block_size": [0, 128]}, "weight_block_size"),
        ({"weight_block_size": [128.0, 128]}, "weight_block_size"),
        ({"weight_block_size": [True, 128]}, "weight_block_size"),
        ({"weight_block_size": "128"}, "weight_block_size"),
        ({"activation_scheme": "static"}, "activation_scheme"),
        ({"fmt": "e5m2"}, "fmt"),
        ({"scale_fmt": "ue4m3"}, "scale_fmt"),
        ({"scale_fmt": ["ue8m0"]}, "scale_fmt"),
        ({"ignored_layers": "lm_head"}, "ignored_layers"),
        ({"modules_to_not_convert": [1]}, "modules_to_not_convert"),
    ],
)
def test_refused_configs_name_the_key(change: dict, named: str) -> None:
    config = {key: value for key, value in (QWEN3 | change).items() if value is not None}
    with pytest.raises(BlockFp8Error, match=rf"quantization_config\.{named}"):
        BlockFp8Config.from_dict(config)


@pytest.mark.parametrize("spelling", ["ue8m0", "UE8M0"])
def test_scales_that_are_powers_of_two(spelling: str) -> None:
    config = BlockFp8Config.from_dict(QWEN3 | {"scale_fmt": spelling})
    assert config == BlockFp8Config(scale_fmt="ue8m0")
    assert config.to_dict() == QWEN3 | {"scale_fmt": "ue8m0"}
    assert config.activation(Activation.W8A8) is Activation.W8A8_UE8M0
    assert config.activation(Activation.W8A16) is Activation.W8A16
    assert config.activation(None) is Activation.W8A8_UE8M0


@pytest.mark.parametrize("spelling", [None, "float", "fp32", "float32", "FP32"])
def test_any_scales(spelling: str | None) -> None:
    config = BlockFp8Config.from_dict(QWEN3 | {"scale_fmt": spelling})
    assert config == BlockFp8Config() and config.to_dict() == QWEN3
    assert [config.activation(asked) for asked in Activation] == list(Activation)


@pytest.mark.parametrize("value", [["x"] * 10**6, "x" * 10**6, "\x1b[2J\n", json.loads("[" * 900 + "]" * 900)])
@pytest.mark.parametrize("key", ["fmt", "scale_fmt", "quant_method", "weight_block_size", "ignored_layers"])
def test_whatever_a_config_holds_the_message_is_short(key: str, value: object) -> None:
    if key == "ignored_layers" and value == ["x"] * 10**6:
        value = [7] * 10**6
    with pytest.raises(BlockFp8Error) as caught:
        BlockFp8Config.from_dict(QWEN3 | {key: value})
    assert len(str(caught.value)) < 1000
    assert all(line.isprintable() for line in str(caught.value).split("\n"))


def test_long_ignore_lists_take_no_time() -> None:
    names = [f"layer{i}" for i in range(MAX_IGNORED)]
    with within(1):
        config = BlockFp8Config.from_dict(QWEN3 | {"ignored_layers": names, "modules_to_not_convert": names[::-1]})
    assert config.ignored == tuple(names)
    with pytest.raises(BlockFp8Error, match="more names"):
        BlockFp8Config.from_dict(QWEN3 | {"ignored_layers": [*names, "one more"]})


def test_error_survives_pickling_between_processes() -> None:
    error = BlockFp8Error("what", where="here", expected=1, got=2, fix="do this")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert all(part in str(error) for part in ("what", "where: here", "expected: 1", "got: 2", "what to do: do this"))


def test_merged_ragged_shards_have_their_own_blocks() -> None:
    grid = BlockGrid((576, 192, 192), 576)
    assert grid.scale_rows == (5, 2, 2)
    assert grid.scale_shape == (9, 5)
    starts = {span.start: span.scale_row for span in grid.spans()}
    assert starts[0] == 0 and starts[576] == 5 and starts[576 + 192] == 7


@given(
    widths=st.lists(st.integers(0, 700), min_size=1, max_size=4),
    k=st.integers(0, 700),
    block=st.builds(BlockSize, st.integers(1, 300), st.integers(1, 300)),
)
def test_spans_cover_every_row_once_and_never_straddle(widths: list[int], k: int, block: BlockSize) -> None:
    grid = BlockGrid(tuple(widths), k, block)
    spans = list(grid.spans())
    rows = [row for span in spans for row in range(span.start, span.start + span.rows)]
    assert rows == list(range(grid.n))
    assert [span.scale_row for span in spans] == list(range(grid.scale_shape[0]))
    edges = {sum(widths[:i]) for i in range(len(widths) + 1)}
    for span in spans:
        assert 0 < span.rows <= block.n
        assert not any(span.start < edge < span.start + span.rows for edge in edges)
    if len(widths) == 1:
        assert grid.scale_shape == scale_shape(widths[0], k, block)
