import math
from pathlib import Path

import pytest
import torch

from qwen3_fp8_ascend.errors import BlockFp8Error
from qwen3_fp8_ascend.testing.models import QWEN3_8B, qwen3_config, qwen3_shapes, write_qwen3
from tests.support.padded_heads import write_with_more_heads

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.arange(40)[None]).logits


def test_the_shape_is_that_of_qwen3_8b() -> None:
    """8.2 B parameters, 6.95 B of them not in embeddings, as the model's card says."""
    shapes = qwen3_shapes(qwen3_config(**QWEN3_8B))
    assert sum(math.prod(shape) for shape in shapes.values()) == 8_190_735_360
    inner = [shape for name, shape in shapes.items() if name.startswith("model.layers.")]
    assert round(sum(map(math.prod, inner)) / 1e9, 2) == 6.95


def test_more_heads_compute_the_same(tmp_path: Path) -> None:
    source = write_qwen3(tmp_path / "source", num_attention_heads=6, num_key_value_heads=2)
    padded = write_with_more_heads(source, tmp_path / "padded", heads=12, kv_heads=4)
    torch.testing.assert_close(logits(padded), logits(source), rtol=1e-5, atol=1e-5)


def test_heads_that_would_be_regrouped_are_refused(tmp_path: Path) -> None:
    source = write_qwen3(tmp_path / "source", num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(BlockFp8Error, match="regrouped"):
        write_with_more_heads(source, tmp_path / "padded", heads=8, kv_heads=2)
