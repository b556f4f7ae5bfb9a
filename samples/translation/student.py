"""Bits of each part of the translation model, and what it is taught: batches, loss, validation.

The loss is word-level distillation on the float model's own translations. Most of a step would go into the output
layer's 32,000 words, so a step sees a part of them: those of the batch, the most frequent ones, and some at random. The
logits of the latter are raised by the logarithm of how many words each stands for, in both models, so that the sums
over all words keep their expectation (as in sampled softmax, Jean et al., arXiv 1412.2007). Validation sees all words.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from onnxq.formats.binary import BinaryFormat
from onnxq.solvers.planes import planes_by_frequency, planes_by_mean, row_errors, row_weights
from onnxq.train import Target, distillation_loss
from samples.translation.corpus import Pair, batches_by_tokens, pad
from tools.marian_model import Student, shift_right

EMBEDDING = "encoder.embed_tokens.weight"


@dataclass(frozen=True)
class Bits:
    """Planes of each part; the defaults are the paper's, with the recurrence in place of the decoder's self-attention.

    Attributes:
        clusters, ratio: of the embedding's rows by token frequency (algorithm 1).
        mean_planes: of the embedding's rows on average, put where they save most; None takes clusters.
    """

    clusters: int = 4
    ratio: float = 1.0
    mean_planes: float | None = None
    encoder_attention: int = 3
    encoder_ffn: int = 4
    recurrence: int = 2
    cross: int = 3
    decoder_ffn: int = 1

    def blocks(self, student: Student, counts: np.ndarray) -> list[list[Target]]:
        """Rules in the order in which the paper's phases add them: embedding, decoder, encoder.

        Args:
            counts: int64 [V], how often each word occurs in the training text, on both sides.
        """
        decoder = [
            Target("decoder.*.rnn.*", self.recurrence),
            Target("decoder.*.encoder_attn.*", self.cross),
            Target("decoder.*.fc?.weight", self.decoder_ffn),
        ]
        encoder = [
            Target("encoder.*.self_attn.*", self.encoder_attention),
            Target("encoder.*.fc?.weight", self.encoder_ffn),
        ]
        return [[Target(EMBEDDING, self._words(student, counts))], decoder, encoder]

    def _words(self, student: Student, counts: np.ndarray) -> np.ndarray:
        if self.mean_planes is None:
            return planes_by_frequency(counts, self.clusters, self.ratio)
        table = student.lm_head.weight.detach().numpy()
        errors = row_errors(table, BinaryFormat.of(len(table), 1))[:, : self.clusters]
        return planes_by_mean(errors, row_weights(counts, 1.0), self.mean_planes)


def count_words(pairs: Sequence[Pair], vocabulary: int) -> np.ndarray:
    """How often each word occurs on either side: int64 [V]."""
    ids = np.concatenate([side for pair in pairs for side in (pair.source, pair.target)])
    return np.bincount(ids, minlength=vocabulary).astype(np.int64)


@dataclass(frozen=True)
class Batch:
    """Padded lines, and the words that a step sees.

    Attributes:
        source, source_mask, labels, label_mask: int64 [lines, longest].
        words: int64 [W], different words, those of `labels` first; None means all.
        at: int64 [lines, longest], where each label stands in `words`.
        standing: float32 [W], the logarithm of how many words each stands for.
    """

    source: Tensor
    source_mask: Tensor
    labels: Tensor
    label_mask: Tensor
    words: Tensor | None
    at: Tensor
    standing: Tensor | None


class Lessons:
    """Batches of a corpus by the number of a step; the same for the same number.

    Args:
        pairs: to learn from.
        counts: see `Bits.blocks`.
        tokens: of a batch, source and target with padding.
        frequent, drawn: words that every step sees, and that are drawn at random.
        seed: of the order and of what is drawn.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        counts: np.ndarray,
        tokens: int = 1536,
        frequent: int = 2000,
        drawn: int = 1500,
        seed: int = 0,
    ) -> None:
        self._pairs, self._drawn, self._seed = pairs, drawn, seed
        self._vocabulary = len(counts)
        self._frequent = np.argsort(-counts, kind="stable")[:frequent]
        self._batches = list(batches_by_tokens(np.array([len(p.source) + len(p.target) for p in pairs]), tokens))
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def steps_of_a_pass(self) -> int:
        """Batches of the whole corpus."""
        return len(self._batches)

    def __call__(self, step: int) -> Batch:
        """The batch of a step."""
        epoch, place = divmod(step, len(self._batches))
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self._seed, 0, epoch)).permutation(len(self._batches))
        batch = collate([self._pairs[i] for i in self._batches[self._order[1][place]]])
        return self._with_words(batch, np.random.default_rng((self._seed, 1, step)))

    def _with_words(self, batch: Batch, rng: np.random.Generator) -> Batch:
        own = np.unique(batch.labels.numpy())
        seen = np.concatenate([own, np.setdiff1d(self._frequent, own)])
        others = np.setdiff1d(np.arange(self._vocabulary), seen, assume_unique=True)
        drawn = rng.choice(others, min(self._drawn, len(others)), replace=False)
        standing = np.zeros(len(seen) + len(drawn), np.float32)
        standing[len(seen) :] = math.log(len(others) / max(len(drawn), 1))
        at = torch.from_numpy(np.searchsorted(own, batch.labels.numpy()))
        words = torch.from_numpy(np.concatenate([seen, drawn]))
        return Batch(
            batch.source, batch.source_mask, batch.labels, batch.label_mask, words, at, torch.from_numpy(standing)
        )


def collate(pairs: Sequence[Pair]) -> Batch:
    """A batch that sees all words."""
    source, source_mask = pad([pair.source for pair in pairs])
    labels, label_mask = pad([pair.target for pair in pairs])
    return Batch(source, source_mask, labels, label_mask, None, labels, None)


def hidden(student: Student, batch: Batch) -> Tensor:
    """What the output layer reads for every word that counts: float32 [words, width]."""
    encoded = student.encoder(batch.source, batch.source_mask)
    lines, length = batch.labels.shape
    states = [encoded.new_zeros(lines, student.shape.hidden) for _ in student.decoder.layers]
    cross = student.decoder.cross(encoded)
    x, _ = student.decoder(shift_right(batch.labels), torch.arange(length), batch.source_mask, cross, states)
    read: Tensor = x[batch.label_mask.bool()]
    return read


def logits(student: Student, read: Tensor, batch: Batch) -> Tensor:
    """Logits of the words that the batch sees."""
    found: Tensor
    if batch.words is None or batch.standing is None:
        found = student.lm_head(read)
        return found
    weight, bias = student.lm_head.weight[batch.words], student.lm_head.bias[batch.words]
    found = nn.functional.linear(read, weight, bias + batch.standing)
    return found


def loss_to(teacher: Student, share: float = 0.9) -> Callable[[nn.Module, Batch], Tensor]:
    """The loss of a student under this teacher, by batch."""

    def loss(module: nn.Module, batch: Batch) -> Tensor:
        assert isinstance(module, Student), "the student is a student"
        with torch.inference_mode():
            wanted = logits(teacher, hidden(teacher, batch), batch)
        found = logits(module, hidden(module, batch), batch)
        return distillation_loss(found, wanted.clone(), batch.at[batch.label_mask.bool()], share=share)

    return loss


class Examination:
    """Mean divergence from the teacher over all words, in nats a word, on pairs that training does not see."""

    def __init__(self, teacher: Student, pairs: Sequence[Pair], tokens: int = 1024) -> None:
        lengths = np.array([len(pair.source) + len(pair.target) for pair in pairs])
        self._batches = [collate([pairs[i] for i in batch]) for batch in batches_by_tokens(lengths, tokens)]
        self._teacher = teacher
        with torch.inference_mode():
            self._read = [hidden(teacher, batch) for batch in self._batches]

    def __call__(self, module: nn.Module) -> float:
        """The divergence of a student."""
        assert isinstance(module, Student), "the student is a student"
        total = words = 0.0
        with torch.inference_mode():
            for batch, read in zip(self._batches, self._read, strict=True):
                wanted, found = self._teacher.lm_head(read), module.lm_head(hidden(module, batch))
                labels = batch.labels[batch.label_mask.bool()]
                total += len(read) * float(distillation_loss(found, wanted, labels, share=1.0))
                words += len(read)
        return total / words
