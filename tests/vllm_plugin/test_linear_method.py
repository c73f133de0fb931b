"""vLLM's own linear layers with our linear method: loading of shards, results, memory, refusals."""

import dataclasses
import gc
import logging
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)

from qwen3_fp8_ascend import reference
from qwen3_fp8_ascend.containers import COMPRESSED_TENSORS, FP8, MODELOPT
from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.format import Activation, BlockFp8Config, BlockSize
from qwen3_fp8_ascend.testing.judges import Problem, assert_exact, random_problem
from qwen3_fp8_ascend.vllm_plugin import linear, loading
from qwen3_fp8_ascend.vllm_plugin.config import BlockFp8AscendConfig
from qwen3_fp8_ascend.vllm_plugin.linear import BlockFp8LinearMethod

QKV = ["q_proj", "k_proj", "v_proj"]
GATE_UP = ["gate_proj", "up_proj"]
ATTENTION = "model.layers.0.self_attn"


def config(ignored: tuple[str, ...] = (), container: str = FP8) -> BlockFp8AscendConfig:
    made = BlockFp8AscendConfig(BlockFp8Config(ignored=ignored, container=container))
    made.packed_modules_mapping = {"qkv_proj": QKV, "gate_up_proj": GATE_UP}
    return made


def qkv_layer(quantization: BlockFp8AscendConfig, **changes: Any) -> QKVParallelLinear:
    """SmolLM2-135M's attention: 576 = 4.5 blocks of queries, 192 = 1.5 blocks of keys and of values."""
    arguments = {"hidden_size": 576, "head_size": 64, "total_num_heads": 9, "total_num_kv_heads": 3, "bias": False}
    return QKVParallelLinear(
        **(arguments | changes),
        params_dtype=torch.bfloat16,
        quant_config=quantization,
        prefix="model.layers.0.self_attn.qkv_proj",
    )


def gate_up_layer(
    k: int, gate: int, up: int, quantization: BlockFp8AscendConfig | None = None
) -> MergedColumnParallelLinear:
    return MergedColumnParallelLinear(
        k,
        [gate, up],
        bias=False,
        params_dtype=torch.bfloat16,
        quant_config=quantization or config(),
        prefix="model.layers.0.mlp.gate_up_proj",
    )


def split(problem: Problem) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The checkpoint's tensors: weight and scale of each shard."""
    grid = problem.grid
    weights = problem.weight.view(torch.uint8).split(grid.widths)
    return [
        (w.view(torch.float8_e4m3fn), s) for w, s in zip(weights, problem.scale.split(grid.scale_rows), strict=True)
    ]


def load(layer: torch.nn.Module, shards: list[tuple[Any, torch.Tensor, torch.Tensor]]) -> None:
    for shard, weight, scale in shards:
        arguments = () if shard is None else (shard,)
        layer.weight.weight_loader(layer.weight, weight, *arguments)
        layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale, *arguments)


def finish(layer: torch.nn.Module) -> torch.nn.Module:
    layer.quant_method.process_weights_after_loading(layer)
    return layer


def loaded_qkv(problem: Problem, **changes: Any) -> torch.nn.Module:
    layer = qkv_layer(config(), **changes)
    load(layer, [(name, *tensors) for name, tensors in zip("qkv", split(problem), strict=True)])
    return layer


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_ragged_qkv(scale_dtype: torch.dtype) -> None:
    problem = random_problem(7, (576, 192, 192), 576)
    problem = Problem(problem.x, problem.weight, problem.scale.to(scale_dtype), grid=problem.grid)
    layer = finish(loaded_qkv(problem))
    out, _ = layer(problem.x)
    assert_exact(out, problem)


@pytest.mark.parametrize("stored", ["fp32", "e8m0", "not powers of two"])
@pytest.mark.parametrize("asked", [Activation.W8A8, Activation.W8A16])
def test_scales_that_are_powers_of_two(stored: str, asked: Activation, caplog: pytest.LogCaptureFixture) -> None:
    """The setting stays w8a8 or w8a16: what w8a8 is, the checkpoint says."""
    problem = random_problem(7, (576, 192, 192), 576)
    powers = reference.round_up_to_power_of_two(problem.scale)
    problem = dataclasses.replace(problem, scale=problem.scale if stored == "not powers of two" else powers)
    on_disk = problem.scale.to(torch.float8_e8m0fnu) if stored == "e8m0" else problem.scale
    form = BlockFp8Config(scale_fmt="ue8m0")
    layer = qkv_layer(config())
    layer.quant_method.activation = form.activation(asked)
    codes = [weight for weight, _ in split(problem)]
    load(layer, list(zip("qkv", codes, on_disk.split(problem.grid.scale_rows), strict=True)))
    with patch.object(loading, "scale_note", loading.ScaleNote()) as note, patch.object(linear, "scale_note", note):
        finish(layer)
    assert note.said is (stored == "not powers of two" and asked is Activation.W8A8)
    assert_exact(layer(problem.x)[0], problem, form.activation(asked))
    with pytest.raises(AssertionError):
        assert_exact(layer(problem.x)[0], problem, Activation.W8A16 if asked is Activation.W8A8 else Activation.W8A8)


def test_bias() -> None:
    problem = random_problem(3, (576, 192, 192), 576, bias=True)
    layer = loaded_qkv(problem, bias=True)
    assert problem.bias is not None
    for name, part in zip("qkv", problem.bias.split([576, 192, 192]), strict=True):
        layer.bias.weight_loader(layer.bias, part, name)
    out, _ = finish(layer)(problem.x)
    assert_exact(out, problem)


LAYERS: dict[str, tuple[Callable[..., torch.nn.Module], tuple[int, ...], list[Any]]] = {
    "gate_up_proj": (lambda k, widths, **kw: MergedColumnParallelLinear(k, list(widths), **kw), (1536, 1536), [0, 1]),
    "ragged_merge": (
        lambda k, widths, **kw: MergedColumnParallelLinear(k, list(widths), **kw),
        (100, 300, 28),
        [0, 1, 2],
    ),
    "down_proj": (lambda k, widths, **kw: RowParallelLinear(k, widths[0], **kw), (576,), [None]),
    "column": (lambda k, widths, **kw: ColumnParallelLinear(k, widths[0], **kw), (200,), [None]),
    "replicated": (lambda k, widths, **kw: ReplicatedLinear(k, widths[0], **kw), (70,), [None]),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("k", [576, 200])
def test_every_kind_of_linear_layer(name: str, k: int) -> None:
    make, widths, shard_ids = LAYERS[name]
    problem = random_problem(5, widths, k)
    layer = make(
        k, widths, bias=False, params_dtype=torch.bfloat16, quant_config=config(), prefix=f"model.layers.0.mlp.{name}"
    )
    load(layer, [(i, *tensors) for i, tensors in zip(shard_ids, split(problem), strict=True)])
    out, _ = finish(layer)(problem.x)
    assert_exact(out, problem)


def test_a_whole_merged_tensor_on_disk() -> None:
    problem = random_problem(5, (256, 128), 256)
    layer = gate_up_layer(256, 256, 128)
    load(layer, [(None, problem.weight, problem.scale)])
    assert_exact(finish(layer)(problem.x)[0], problem)


def test_compiled_with_a_dynamic_batch() -> None:
    problem = random_problem(7, (576, 192, 192), 576)
    layer = finish(loaded_qkv(problem))
    compiled = torch.compile(lambda x: layer(x)[0] * 2, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (1, 5, 7):
        assert torch.equal(compiled(problem.x[:m]), layer(problem.x[:m])[0] * 2)


def test_one_resident_copy_at_one_byte_a_weight() -> None:
    problem = random_problem(1, (1536, 1536), 576)
    layer = gate_up_layer(576, 1536, 1536)
    load(layer, [(i, *tensors) for i, tensors in enumerate(split(problem))])
    originals = [weakref.ref(t.untyped_storage()) for t in (layer.weight.data, layer.weight_scale_inv.data)]
    finish(layer)
    gc.collect()
    assert [ref() for ref in originals] == [None, None]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in (*layer.packed_weight.tensors, *layer.parameters(), *layer.buffers())
    }
    weights = 2 * 1536 * 576
    assert weights <= sum(storages.values()) <= 1.01 * weights + 64 * problem.scale.numel() * 4


@pytest.mark.parametrize(
    ("ignored", "quantized"),
    [
        ((), True),
        (
            ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.v_proj"),
            False,
        ),
        ((f"{ATTENTION}.qkv_proj",), False),
        ((ATTENTION,), False),
        (("qkv_proj",), False),
        (("lm_head",), True),
    ],
)
def test_ignored_layers(ignored: tuple[str, ...], quantized: bool) -> None:
    layer = qkv_layer(config(ignored))
    assert isinstance(layer.quant_method, UnquantizedLinearMethod) is not quantized


def test_half_ignored_merged_layers_are_refused() -> None:
    with pytest.raises(BlockFp8Error, match=r"only some\n  where: model\.layers\.0\.self_attn\.qkv_proj"):
        qkv_layer(config((f"{ATTENTION}.q_proj",)))


def _spoiled(
    shard: int, weight: Callable[[torch.Tensor], Any] | None = None, scale: Callable[[torch.Tensor], Any] | None = None
) -> Any:
    problem = random_problem(1, (576, 192, 192), 576)
    parts = split(problem)
    w, s = (t.clone() for t in parts[shard])
    if weight:
        w = weight(w)
    if scale:
        s = scale(s)
    parts[shard] = (w, s)
    layer = qkv_layer(config())
    load(layer, [(name, *tensors) for name, tensors in zip("qkv", parts, strict=True) if tensors[0] is not None])
    return finish(layer)


def _set(value: float | int) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        (tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor)[1, 2] = value
        return tensor

    return change


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"shard": 1, "weight": _set(0x7F)}, r"self_attn\.k_proj\.weight\n.*\n  got: 1 NaN of 110592"),
        ({"shard": 2, "weight": _set(0xFF)}, r"self_attn\.v_proj\.weight"),
        ({"shard": 0, "scale": _set(float("inf"))}, r"self_attn\.q_proj\.weight_scale_inv"),
        ({"shard": 1, "scale": _set(-1.0)}, r"self_attn\.k_proj\.weight_scale_inv"),
        (
            {"shard": 2, "weight": lambda w: w.bfloat16()},
            r"qkv_proj\.weight, shard v\n  expected: float8_e4m3fn\n  got: bfloat16",
        ),
        ({"shard": 2, "weight": lambda w: w[:100]}, r"does not fit the layer\n  where: .*qkv_proj\.weight, shard v"),
        (
            {"shard": 1, "scale": lambda s: s[:1]},
            r"does not fit the layer\n  where: .*qkv_proj\.weight_scale_inv, shard k",
        ),
        ({"shard": 1, "scale": lambda s: s.half()}, r"wrong dtype\n  where: .*qkv_proj\.weight_scale_inv, shard k"),
    ],
)
def test_spoiled_tensors_are_named(arguments: dict, said: str) -> None:
    with pytest.raises(BlockFp8Error, match=said):
        _spoiled(**arguments)


@pytest.mark.parametrize("container", [COMPRESSED_TENSORS, MODELOPT])
def test_errors_name_scales_as_the_file_does(container: str) -> None:
    problem = random_problem(1, (192, 64), 256)
    quantization = config(container=container)
    layer = gate_up_layer(256, 192, 64, quantization)
    bad = problem.scale.clone()
    bad[2, 1] = -1.0  # the second shard's only row
    scales = bad.split(problem.grid.scale_rows)
    for shard, ((weight, _), scale) in enumerate(zip(split(problem), scales, strict=True)):
        layer.weight.weight_loader(layer.weight, weight, shard)
        layer.weight_scale.weight_loader(layer.weight_scale, scale, shard)
    with pytest.raises(BlockFp8Error, match=r"scales.*\n  where: .*up_proj\.weight_scale\n"):
        finish(layer)


@pytest.mark.parametrize(("skip_weight", "skip_scale"), [(True, False), (False, True)])
def test_missing_tensors_are_named(skip_weight: bool, skip_scale: bool) -> None:
    layer = qkv_layer(config())
    for name, (weight, scale) in zip("qkv", split(random_problem(1, (576, 192, 192), 576)), strict=True):
        if not (skip_weight and name == "k"):
            layer.weight.weight_loader(layer.weight, weight, name)
        if not (skip_scale and name == "k"):
            layer.weight_scale_inv.weight_loader(layer.weight_scale_inv, scale, name)
    with pytest.raises(BlockFp8Error, match=r"(weight is|scales are) missing.*\n  where: .*k_proj"):
        finish(layer)


def test_a_ragged_merged_tensor_on_disk_is_refused() -> None:
    problem = random_problem(1, (576, 192, 192), 576)
    layer = qkv_layer(config())
    with pytest.raises(BlockFp8Error, match="merged on disk"):
        layer.weight.weight_loader(layer.weight, problem.weight)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend to be rank `rank` of `size`, for layers made afterwards."""

    def pretend(rank: int, size: int) -> None:
        for module in ("layers.linear", "parameter"):
            path = f"vllm.model_executor.{module}.get_tensor_model_parallel"
            monkeypatch.setattr(f"{path}_rank", lambda: rank)
            monkeypatch.setattr(f"{path}_world_size", lambda: size)

    return pretend


@pytest.mark.parametrize("size", [2, 4])
def test_tensor_parallel_shards_add_up(ranks: Callable[[int, int], None], size: int) -> None:
    """Query heads are split, the two key/value heads are split over two ranks and shared by four."""
    problem = random_problem(4, (1024, 256, 256), 512)
    whole = reference.block_linear(problem.x, problem.weight, problem.scale, grid=problem.grid)
    q, k, v = whole.split(problem.grid.widths, dim=1)  # type: ignore[arg-type]
    for rank in range(size):
        ranks(rank, size)
        layer = qkv_layer(config(), hidden_size=512, head_size=128, total_num_heads=8, total_num_kv_heads=2)
        load(layer, [(name, *tensors) for name, tensors in zip("qkv", split(problem), strict=True)])
        finish(layer)
        out = layer.quant_method.apply(layer, problem.x)
        kv_rank, kv_size = (rank, 2) if size == 2 else (rank // 2, 2)
        want = torch.cat([q.chunk(size, 1)[rank], k.chunk(kv_size, 1)[kv_rank], v.chunk(kv_size, 1)[kv_rank]], 1)
        assert (out == want).double().mean() > 0.995


def test_row_parallel_shards_add_up(ranks: Callable[[int, int], None]) -> None:
    problem = random_problem(4, (200,), 512, dtype=torch.float32)
    total = torch.zeros(4, 200)
    for rank in range(2):
        ranks(rank, 2)
        layer = RowParallelLinear(
            512, 200, bias=False, params_dtype=torch.float32, quant_config=config(), prefix="down_proj"
        )
        load(layer, [(None, problem.weight, problem.scale)])
        finish(layer)
        total += layer.quant_method.apply(layer, problem.x[:, rank * 256 : (rank + 1) * 256])
    assert_exact(total, problem)


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(6, 2, 2), (9, 3, 3), (12, 3, 6), (4, 2, 4), (9, 3, 9)])
def test_rows_are_cut_anywhere(ranks: Callable[[int, int], None], heads: int, kv_heads: int, size: int) -> None:
    """Query heads of 64 rows are half a block; key/value heads are divided too, or shared by several ranks."""
    problem = random_problem(4, (heads * 64, kv_heads * 64, kv_heads * 64), 200)
    q, k, v = problem.oracle().split(problem.grid.widths, dim=1)  # type: ignore[arg-type]
    for rank in range(size):
        ranks(rank, size)
        layer = qkv_layer(config(), hidden_size=200, head_size=64, total_num_heads=heads, total_num_kv_heads=kv_heads)
        load(layer, [(name, *tensors) for name, tensors in zip("qkv", split(problem), strict=True)])
        out = finish(layer).quant_method.apply(layer, problem.x)
        kv_rank, kv_size = (rank * kv_heads // size, kv_heads) if size > kv_heads else (rank, size)
        want = torch.cat([q.chunk(size, 1)[rank], k.chunk(kv_size, 1)[kv_rank], v.chunk(kv_size, 1)[kv_rank]], 1)
        assert (out == want.to(out.dtype)).double().mean() > 0.995


def test_one_column_parallel_tensor_is_cut_anywhere(ranks: Callable[[int, int], None]) -> None:
    problem = random_problem(4, (600,), 200)
    want = problem.oracle().to(torch.bfloat16).chunk(4, 1)
    for rank in range(4):
        ranks(rank, 4)
        layer = ColumnParallelLinear(
            200, 600, bias=False, params_dtype=torch.bfloat16, quant_config=config(), prefix="model.layers.0.one_proj"
        )
        load(layer, [(None, problem.weight, problem.scale)])
        out = finish(layer).quant_method.apply(layer, problem.x)
        assert (out == want[rank]).double().mean() > 0.995


def test_a_merged_tensor_on_disk_is_cut_within_its_blocks(ranks: Callable[[int, int], None]) -> None:
    """Its shards are whole blocks, the parts of them on each rank are not."""
    problem = random_problem(5, (256, 128), 256)
    want = [part.chunk(4, 1) for part in problem.oracle().to(torch.bfloat16).split((256, 128), 1)]
    for rank in range(4):
        ranks(rank, 4)
        layer = gate_up_layer(256, 256, 128)
        load(layer, [(None, problem.weight, problem.scale)])
        out = finish(layer).quant_method.apply(layer, problem.x)
        assert (out == torch.cat([part[rank] for part in want], 1)).double().mean() > 0.995


def test_bad_values_behind_a_cut_are_named(ranks: Callable[[int, int], None]) -> None:
    problem = random_problem(4, (384, 128, 128), 200)
    parts = split(problem)
    parts[1][1][0, 1] = -1.0
    ranks(1, 2)
    layer = qkv_layer(config(), hidden_size=200, head_size=64, total_num_heads=6, total_num_kv_heads=2)
    load(layer, [(name, *tensors) for name, tensors in zip("qkv", parts, strict=True)])
    with pytest.raises(BlockFp8Error, match=r"where: model\.layers\.0\.self_attn\.k_proj\.weight_scale_inv"):
        finish(layer)


def test_a_block_that_no_backend_serves_is_said_before_anything_is_loaded() -> None:
    quantization = BlockFp8AscendConfig(BlockFp8Config(BlockSize(1, 128)))
    with pytest.raises(BlockFp8Error, match=r"no backend can run block FP8 on cpu(?s:.*)32 rows.*, not 1x128"):
        ColumnParallelLinear(
            256, 256, bias=False, params_dtype=torch.bfloat16, quant_config=quantization, prefix="model.layers.0.one"
        )


def down_proj(k: int, **changes: Any) -> RowParallelLinear:
    return RowParallelLinear(
        k, 200, **({"bias": False, "params_dtype": torch.float32, "quant_config": config()} | changes), prefix="down"
    )


@pytest.fixture
def tensor_parallel(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Pretend that vLLM's group is that of `ranks`, too."""

    def pretend(rank: int, size: int) -> None:
        monkeypatch.setattr(linear, "get_tp_group", lambda: SimpleNamespace(rank_in_group=rank, world_size=size))

    return pretend


@pytest.mark.parametrize("activation", list(Activation))
@pytest.mark.parametrize(("k", "size"), [(1152, 2), (320, 2), (640, 10), (1000, 4), (384, 3)])
def test_columns_are_cut_anywhere(
    ranks: Callable[[int, int], None],
    tensor_parallel: Callable[[int, int], None],
    monkeypatch: pytest.MonkeyPatch,
    activation: Activation,
    k: int,
    size: int,
) -> None:
    """The ranks take turns: what each gives to the exchange is collected first."""
    problem = random_problem(4, (200,), k, dtype=torch.float32)
    layers = []

    def method(layer: torch.nn.Module, prefix: str) -> BlockFp8LinearMethod:
        return BlockFp8LinearMethod(BlockSize(), prefix=prefix, activation=activation)

    for rank in range(size):
        ranks(rank, size)
        tensor_parallel(rank, size)
        quantization = config()
        quantization.get_quant_method = method  # type: ignore[method-assign]
        layer = down_proj(k, quant_config=quantization)
        load(layer, [(None, problem.weight, problem.scale)])
        layers.append(finish(layer))
    parts = problem.x.chunk(size, 1)
    given: list[torch.Tensor] = []

    def collect(own: torch.Tensor) -> torch.Tensor:
        given.append(own)
        return own.repeat(1, size)

    monkeypatch.setattr(linear, "tensor_model_parallel_all_gather", collect)
    for layer, x in zip(layers, parts, strict=True):
        layer.quant_method.apply(layer, x)
    exchanged = size if activation is not Activation.W8A16 and (k // size) % 128 else 0
    assert len(given) == exchanged
    monkeypatch.setattr(linear, "tensor_model_parallel_all_gather", lambda own: torch.cat(given, 1))
    total = sum(layer.quant_method.apply(layer, x) for layer, x in zip(layers, parts, strict=True))
    assert isinstance(total, torch.Tensor)
    assert_exact(total, problem, activation)


def test_columns_of_ranks_that_vllm_does_not_exchange_between_are_refused(ranks: Callable[[int, int], None]) -> None:
    ranks(0, 2)
    with pytest.raises(BlockFp8Error, match=r"columns a rank in multiples of 128") as refused:
        down_proj(1152)
    assert "divide this layer by 1 or 3 or 9," in str(refused.value)


def test_whole_blocks_that_all_ranks_hold(ranks: Callable[[int, int], None]) -> None:
    """As some models' layers load what they do not divide: with the first rank's number, on every rank."""
    problem = random_problem(4, (512,), 200)
    ranks(1, 2)
    layer = ColumnParallelLinear(
        200, 512, bias=False, params_dtype=torch.bfloat16, quant_config=config(), prefix="model.layers.0.one_proj"
    )
    layer.weight.tp_rank = layer.weight_scale_inv.tp_rank = 0
    load(layer, [(None, problem.weight, problem.scale)])
    out = finish(layer).quant_method.apply(layer, problem.x)
    assert (out == problem.oracle().to(out.dtype)[:, :256]).double().mean() > 0.995


def test_rows_that_vllm_gives_otherwise_are_refused(ranks: Callable[[int, int], None]) -> None:
    """Of a shard that starts within a block."""
    problem = random_problem(4, (600,), 200)
    ranks(1, 2)
    layer = ColumnParallelLinear(
        200, 600, bias=False, params_dtype=torch.bfloat16, quant_config=config(), prefix="model.layers.0.one_proj"
    )
    layer.weight_scale_inv.tp_rank = 0
    with pytest.raises(
        BlockFp8Error, match=r"(?s)one_proj\.weight_scale_inv.*rows for rank 0 are loaded, which start elsewhere"
    ):
        load(layer, [(None, problem.weight, problem.scale)])


def test_packing_reports_its_progress(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(loading, "REPORT_BYTES", 1000)
    monkeypatch.setattr(linear, "packing", loading.PackingProgress())
    monkeypatch.setattr(logging.getLogger("qwen3_fp8_ascend"), "propagate", True)
    with caplog.at_level("INFO", logger="qwen3_fp8_ascend"):
        finish(loaded_qkv(random_problem(1, (576, 192, 192), 576)))
    assert "packed 1 block-FP8 layers" in caplog.text
