from __future__ import annotations

import pytest

from onnxq.graph.parts import layer_of, part_of


@pytest.mark.parametrize(
    ("name", "graph", "look_ups", "part"),
    [
        # Marian and Whisper, as optimum names nodes
        ("/layers.0/self_attn/q_proj/MatMul", "encoder_model", False, "encoder.attention"),
        ("/layers.3/fc2/MatMul", "encoder_model", False, "encoder.ffn"),
        ("/model/decoder/layers.0/self_attn/k_proj/MatMul", "decoder_model_merged", False, "decoder.attention"),
        ("/model/decoder/layers.0/encoder_attn/k_proj/MatMul", "decoder_model", False, "decoder.cross"),
        ("/model/decoder/layers.5/fc1/MatMul", "decoder_with_past_model", False, "decoder.ffn"),
        ("/lm_head/MatMul", "decoder_model", False, "embedding"),
        ("/proj_out/MatMul", "decoder_model", False, "embedding"),
        ("/embed_tokens/Gather", "encoder_model", True, "embedding"),
        ("/embed_positions/Gather", "encoder_model", True, "positions"),
        # a recurrent decoder whose cross-attention keys are computed beside the encoder
        ("/decoder/layers.0/rnn/Wf/MatMul", "decoder_model", False, "decoder.attention"),
        ("/decoder/layers.1/encoder_attn/v_proj/MatMul", "encoder_model", False, "decoder.cross"),
        # T5
        ("/block.0/layer.0/SelfAttention/q/MatMul", "encoder_model", False, "encoder.attention"),
        ("/block.1/layer.1/DenseReluDense/wi/MatMul", "encoder_model", False, "encoder.ffn"),
        ("/decoder/block.0/layer.1/EncDecAttention/o/MatMul", "decoder_model", False, "decoder.cross"),
        ("/decoder/block.0/layer.2/DenseReluDense/wo/MatMul", "decoder_model", False, "decoder.ffn"),
        ("/block.0/layer.0/SelfAttention/relative_attention_bias/Gather", "encoder_model", True, "positions"),
        # BERT and Llama
        ("encoder.layer.0.attention.output.dense.weight", "model", False, "encoder.attention"),
        ("encoder.layer.0.output.dense.weight", "model", False, "encoder.ffn"),
        ("encoder.layer.0.intermediate.dense.weight", "model", False, "encoder.ffn"),
        ("embeddings.position_embeddings.weight", "model", True, "positions"),
        ("model.layers.2.mlp.gate_proj.weight", "model", False, "ffn"),
        ("model.layers.2.self_attn.o_proj.weight", "model", False, "attention"),
        ("onnx::MatMul_71", "model", False, "other"),
    ],
)
def test_parts(name: str, graph: str, look_ups: bool, part: str) -> None:
    assert part_of([name], graph, look_ups=look_ups) == part


def test_layers() -> None:
    assert layer_of(["onnx::MatMul_1", "/model/decoder/layers.11/fc1/MatMul"]) == 11
    assert layer_of(["/decoder/block.3/layer.1/EncDecAttention/o/MatMul"]) == 3
    assert layer_of(["encoder.layer.4.output.dense.weight"]) == 4
    assert layer_of(["/lm_head/MatMul"]) is None
