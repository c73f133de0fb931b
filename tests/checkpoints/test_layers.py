"""Names: which weights are linear layers of the decoder, and what an ignore list means."""

from __future__ import annotations

import pytest

from qwen3_fp8_ascend.checkpoints.layers import is_decoder_linear, is_ignored, layer_index


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("layers.11.mlp.gate_proj.weight", True),
        ("model.language_model.layers.3.mlp.down_proj.weight", True),
        ("model.layers.0.mlp.experts.7.up_proj.weight", True),
        ("model.layers.0.mlp.shared_expert.up_proj.weight", True),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", True),
        ("conversation.layers.0.mlp.up_proj.weight", True),
        ("model.layers.0.mlp.gate.weight", False),
        ("model.layers.0.block_sparse_moe.router.weight", False),
        ("model.layers.0.mlp.shared_expert_gate.weight", False),
        ("model.layers.0.input_layernorm.weight", False),
        ("model.layers.0.self_attn.q_proj.bias", False),
        ("model.layers.0.self_attn.q_proj.weight_scale_inv", False),
        ("model.embed_tokens.weight", False),
        ("model.layers.0.embed.weight", False),
        ("lm_head.weight", False),
        ("visual.blocks.0.attn.qkv.weight", False),
        ("vision_tower.encoder.layers.0.self_attn.q_proj.weight", False),
        ("audio_tower.layers.0.fc1.weight", False),
    ],
)
def test_which_weights_are_decoder_linears(name: str, expected: bool) -> None:
    assert is_decoder_linear(name, (8, 8)) is expected
    assert not is_decoder_linear(name, (8,))
    assert not is_decoder_linear(name, (8, 8, 8))


def test_ignore_lists_match_whole_path_components() -> None:
    module = "model.layers.1.self_attn.q_proj"
    assert all(is_ignored(module, {name}) for name in (module, "model.layers.1", "q_proj", "self_attn.q_proj"))
    assert not any(is_ignored(module, {name}) for name in ("", "proj", "model.layers.11", "attn.q_proj", f"{module}.x"))
    assert layer_index("model.layers.12.mlp.up_proj") == 12
