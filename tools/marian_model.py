"""The Marian student for translation, in torch: a transformer encoder, and a decoder without self-attention.

The decoder's layers hold a recurrence where others have self-attention, the SSRU (Kim et al., 2019, "From Research to
Production and Back", section 3.1). So one state of `hidden` values a layer replaces the growing cache. All layer norms
come after the residual sum, and the embedding of both sides and the output layer are one matrix.

`Student` computes all positions at once from the right tokens, for training. `EncoderGraph` and `StepGraph` are what is
exported: the encoder with the keys and values of the decoder's cross-attention, which do not change from step to step,
and one step of the decoder.

This module imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

START = -1
"""Stands for "no token yet": its embedding is zero. It is the first input of the decoder."""

MASKED = -1e9
"""Added to the scores of padding."""

NORM_EPSILON = 1e-6


@dataclass(frozen=True)
class StudentShape:
    """Sizes of a student; the defaults are those of Marian's "tiny" models."""

    vocabulary: int = 32000
    hidden: int = 256
    heads: int = 8
    ffn: int = 1536
    encoder_layers: int = 6
    decoder_layers: int = 2


def sinusoids(positions: Tensor, hidden: int) -> Tensor:
    """Position codes float32 [n, hidden] of float32 positions [n]: sines in the first half, cosines in the second."""
    half = hidden // 2
    rates = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000) / (half - 1)))
    angles = positions[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], -1)


def additive_mask(attention_mask: Tensor) -> Tensor:
    """int64 [batch, source], 1 for tokens, as a summand of scores, float32 [batch, 1, 1, source]."""
    return (1 - attention_mask[:, None, None, :].to(torch.float32)) * MASKED


class Attention(nn.Module):
    """Multi-head attention without its residual and norm."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.width = hidden // heads
        self.q_proj = nn.Linear(hidden, hidden)
        self.k_proj = nn.Linear(hidden, hidden)
        self.v_proj = nn.Linear(hidden, hidden)
        self.out_proj = nn.Linear(hidden, hidden)

    def keys_values(self, read: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, n, hidden / heads] of what is read, [batch, n, hidden]."""
        return self._split(self.k_proj(read)), self._split(self.v_proj(read))

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """[batch, m, hidden] for queries of that shape."""
        scores = self._split(self.q_proj(query)) @ keys.transpose(2, 3) / math.sqrt(self.width) + mask
        mixed = scores.softmax(-1) @ values
        # One size is read off the tensor and one is left open: fewer nodes in the graph than with two read.
        out: Tensor = self.out_proj(mixed.transpose(1, 2).reshape(-1, query.shape[1], self.heads * self.width))
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.view(-1, x.shape[1], self.heads, self.width).transpose(1, 2)


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by residual sum and norm."""

    def __init__(self, shape: StudentShape) -> None:
        super().__init__()
        self.self_attn = Attention(shape.hidden, shape.heads)
        self.self_attn_layer_norm = nn.LayerNorm(shape.hidden, NORM_EPSILON)
        self.fc1 = nn.Linear(shape.hidden, shape.ffn)
        self.fc2 = nn.Linear(shape.ffn, shape.hidden)
        self.final_layer_norm = nn.LayerNorm(shape.hidden, NORM_EPSILON)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        keys, values = self.self_attn.keys_values(x)
        x = self.self_attn_layer_norm(x + self.self_attn(x, keys, values, mask))
        out: Tensor = self.final_layer_norm(x + self.fc2(self.fc1(x).relu()))
        return out


class Recurrence(nn.Module):
    """Simpler simple recurrent unit: c' = f c + (1 - f) W x with f = sigmoid(Wf x + bf); its output is relu(c')."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.W = nn.Linear(hidden, hidden, bias=False)
        self.Wf = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs [batch, n, hidden] and the last state [batch, hidden], from inputs and the first state."""
        forget = self.Wf(x).sigmoid()
        fresh = (1 - forget) * self.W(x)
        states = []
        for keep, add in zip(forget.unbind(1), fresh.unbind(1), strict=True):
            state = keep * state + add
            states.append(state)
        return torch.stack(states, 1).relu(), state


class DecoderLayer(nn.Module):
    """Recurrence, cross-attention and feed-forward, each followed by residual sum and norm."""

    def __init__(self, shape: StudentShape) -> None:
        super().__init__()
        self.rnn = Recurrence(shape.hidden)
        self.rnn_layer_norm = nn.LayerNorm(shape.hidden, NORM_EPSILON)
        self.encoder_attn = Attention(shape.hidden, shape.heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(shape.hidden, NORM_EPSILON)
        self.fc1 = nn.Linear(shape.hidden, shape.ffn)
        self.fc2 = nn.Linear(shape.ffn, shape.hidden)
        self.final_layer_norm = nn.LayerNorm(shape.hidden, NORM_EPSILON)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, mask: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        recurrent, state = self.rnn(x, state)
        x = self.rnn_layer_norm(x + recurrent)
        x = self.encoder_attn_layer_norm(x + self.encoder_attn(x, keys, values, mask))
        return self.final_layer_norm(x + self.fc2(self.fc1(x).relu())), state


class Encoder(nn.Module):
    """Token ids int64 [batch, source] and mask to [batch, source, hidden]."""

    def __init__(self, shape: StudentShape, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.hidden = shape.hidden
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(shape.encoder_layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).to(torch.float32)
        x: Tensor = self.embed_tokens(input_ids) * math.sqrt(self.hidden) + sinusoids(positions, self.hidden)
        mask = additive_mask(attention_mask)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Decoder(nn.Module):
    """Token ids int64 [batch, n] to [batch, n, hidden], from the states before them."""

    def __init__(self, shape: StudentShape, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        self.hidden = shape.hidden
        self.embed_tokens = embed_tokens
        self.layers = nn.ModuleList(DecoderLayer(shape) for _ in range(shape.decoder_layers))

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention_mask: Tensor,
        cross: Sequence[tuple[Tensor, Tensor]],
        states: Sequence[Tensor],
    ) -> tuple[Tensor, list[Tensor]]:
        known = (input_ids >= 0).unsqueeze(-1).to(torch.float32)
        embedded = self.embed_tokens(input_ids.clamp(min=0)) * known
        x = embedded * math.sqrt(self.hidden) + sinusoids(positions.to(torch.float32), self.hidden)
        mask = additive_mask(attention_mask)
        after = []
        for layer, (keys, values), state in zip(self.layers, cross, states, strict=True):
            x, new_state = layer(x, keys, values, mask, state)
            after.append(new_state)
        return x, after

    def cross(self, encoded: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the cross-attention, by layer."""
        layers = cast("list[DecoderLayer]", list(self.layers))
        return [layer.encoder_attn.keys_values(encoded) for layer in layers]


class Student(nn.Module):
    """The whole model; `encoder.embed_tokens`, `decoder.embed_tokens` and `lm_head` have one weight."""

    def __init__(self, shape: StudentShape) -> None:
        super().__init__()
        self.shape = shape
        embed_tokens = nn.Embedding(shape.vocabulary, shape.hidden)
        nn.init.normal_(embed_tokens.weight, std=shape.hidden**-0.5)
        self.encoder = Encoder(shape, embed_tokens)
        self.decoder = Decoder(shape, embed_tokens)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary)
        self.lm_head.weight = embed_tokens.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """Logits of every position, given the right tokens before it (teacher forcing).

        Args:
            input_ids: int64 [batch, source]; a source ends with `</s>`.
            attention_mask: int64 [batch, source], 1 for tokens and 0 for padding.
            decoder_input_ids: int64 [batch, target], as `shift_right` makes them.

        Returns:
            float32 [batch, target, vocabulary].
        """
        encoded = self.encoder(input_ids, attention_mask)
        batch, length = decoder_input_ids.shape
        positions = torch.arange(length, device=input_ids.device)
        states = [encoded.new_zeros(batch, self.shape.hidden) for _ in self.decoder.layers]
        x, _ = self.decoder(decoder_input_ids, positions, attention_mask, self.decoder.cross(encoded), states)
        logits: Tensor = self.lm_head(x)
        return logits


def shift_right(labels: Tensor) -> Tensor:
    """Inputs of the decoder for the tokens it shall put out, int64 [batch, target]: `START` first, the last cut."""
    return torch.cat([torch.full_like(labels[:, :1], START), labels[:, :-1]], 1)


class EncoderGraph(nn.Module):
    """What `encoder_model.onnx` computes."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.encoder = student.encoder
        self.decoder = student.decoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        encoded = self.encoder(input_ids, attention_mask)
        return encoded, *(tensor for pair in self.decoder.cross(encoded) for tensor in pair)


class StepGraph(nn.Module):
    """What `decoder_model.onnx` computes: logits and states after one more token."""

    def __init__(self, student: Student) -> None:
        super().__init__()
        self.decoder = student.decoder
        self.lm_head = student.lm_head

    def forward(
        self, input_ids: Tensor, position: Tensor, encoder_attention_mask: Tensor, *cross_and_states: Tensor
    ) -> tuple[Tensor, ...]:
        layers = len(self.decoder.layers)
        cross = [(cross_and_states[2 * i], cross_and_states[2 * i + 1]) for i in range(layers)]
        x, states = self.decoder(input_ids, position, encoder_attention_mask, cross, cross_and_states[2 * layers :])
        return self.lm_head(x), *states


def load_student(parameters: Mapping[str, np.ndarray], shape: StudentShape) -> Student:
    """The model with the weights of a Marian file, as `tools.marian.read_marian` gives them."""
    student = Student(shape)
    state = {}

    def linear(ours: str, weight: str, bias: str | None) -> None:
        state[f"{ours}.weight"] = parameters[weight].T  # Marian's are [in, out]
        if bias is not None:
            state[f"{ours}.bias"] = parameters[bias].reshape(-1)

    def norm(ours: str, theirs: str) -> None:
        state[f"{ours}.weight"] = parameters[f"{theirs}_ln_scale"].reshape(-1)
        state[f"{ours}.bias"] = parameters[f"{theirs}_ln_bias"].reshape(-1)

    def attention(ours: str, theirs: str) -> None:
        for part, letter in (("q_proj", "q"), ("k_proj", "k"), ("v_proj", "v"), ("out_proj", "o")):
            linear(f"{ours}.{part}", f"{theirs}_W{letter}", f"{theirs}_b{letter}")
        norm(f"{ours}_layer_norm", f"{theirs}_Wo")

    def feed_forward(ours: str, theirs: str) -> None:
        linear(f"{ours}.fc1", f"{theirs}_W1", f"{theirs}_b1")
        linear(f"{ours}.fc2", f"{theirs}_W2", f"{theirs}_b2")
        norm(f"{ours}.final_layer_norm", f"{theirs}_ffn")

    for i in range(shape.encoder_layers):
        attention(f"encoder.layers.{i}.self_attn", f"encoder_l{i + 1}_self")
        feed_forward(f"encoder.layers.{i}", f"encoder_l{i + 1}_ffn")
    for i in range(shape.decoder_layers):
        ours, theirs = f"decoder.layers.{i}", f"decoder_l{i + 1}"
        linear(f"{ours}.rnn.W", f"{theirs}_rnn_W", None)
        linear(f"{ours}.rnn.Wf", f"{theirs}_rnn_Wf", f"{theirs}_rnn_bf")
        norm(f"{ours}.rnn_layer_norm", f"{theirs}_rnn_ffn")
        attention(f"{ours}.encoder_attn", f"{theirs}_context")
        feed_forward(ours, f"{theirs}_ffn")
    for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
        state[name] = parameters["Wemb"]
    state["lm_head.bias"] = parameters["decoder_ff_logit_out_b"].reshape(-1)
    student.load_state_dict({name: torch.from_numpy(np.array(value, order="C")) for name, value in state.items()})
    return student.eval()
