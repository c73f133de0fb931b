"""Names: which weights are linear layers of the decoder."""

from __future__ import annotations

import pytest

from qwen3_fp8_ascend.checkpoints.layers import is_decoder_linear, layer_index


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
        ("mtp.layers.0.self_attn.q_proj.weight", True),
        ("mtp.fc.weight", False),
        ("model.layers.61.eh_proj.weight", False),
        ("model.layers.61.shared_head.head.weight", False),
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


def test_the_number_of_a_layer() -> None:
    assert layer_index("model.layers.12.mlp.up_proj") == 12
