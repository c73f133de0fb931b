"""Layers for multi-token prediction (MTP) in a checkpoint: quantized but for what is around them, and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from qwen3_fp8_ascend.checkpoints.inspect import check_checkpoint
from qwen3_fp8_ascend.checkpoints.plan import FP8
from qwen3_fp8_ascend.checkpoints.quantize import quantize_checkpoint
from tests.support.checkpoint_folders import one_thread  # noqa: F401
from tests.support.mtp_models import DEEPSEEK, GLM4_MOE, QWEN3_5, write_mtp

IN_FP8 = {
    DEEPSEEK: ["self_attn.q_a_proj", "self_attn.kv_b_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"],
    GLM4_MOE: ["self_attn.q_proj", "self_attn.o_proj", "mlp.experts", "mlp.shared_experts.up_proj"],
    QWEN3_5: ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"],
}
AROUND = {
    DEEPSEEK: ["eh_proj", "shared_head.head", "embed_tokens"],
    GLM4_MOE: ["eh_proj", "shared_head.head", "embed_tokens", "mlp.gate"],
    QWEN3_5: [],
}


@pytest.mark.parametrize("family", IN_FP8)
def test_the_layer_is_quantized_and_a_note_says_what_it_is_for(tmp_path: Path, family: str) -> None:
    source = write_mtp(tmp_path / "bf16", family, echo=True)
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    report = check_checkpoint(tmp_path / "fp8")
    layer = "mtp.layers.0" if family == QWEN3_5 else "model.layers.1"
    kinds = report.plan.kinds()
    assert {kinds[f"{layer}.{name}"] for name in IN_FP8[family]} == {FP8}
    assert {kinds[f"{layer}.{name}"] for name in AROUND[family]} <= {"float"}
    (note,) = report.anomalies
    assert (note.severity, report.notes) == ("note", (note,))
    assert "multi-token prediction" in note.what and '"method": "mtp"' in note.fix
    prefix = "mtp." if family == QWEN3_5 else "model.layers.1."
    count = sum(name.startswith(prefix) for name in load_file(tmp_path / "fp8" / "model.safetensors"))
    assert note.got == f"{count} tensors"


def test_layers_beyond_the_last_are_not_taken_for_it_unless_the_config_says_so(tmp_path: Path) -> None:
    source = write_mtp(tmp_path / "bf16", DEEPSEEK, echo=True)
    quantize_checkpoint(source, tmp_path / "fp8", progress=False)
    file = tmp_path / "fp8" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_nextn_predict_layers": 0}))
    assert check_checkpoint(tmp_path / "fp8").anomalies == ()
