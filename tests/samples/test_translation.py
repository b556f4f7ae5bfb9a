"""The parts of the translation sample on a tiny random student: no text, no trained weights."""

from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from onnxq.train import Phase, distillation_loss, project, retrain
from samples.translation.corpus import Pair, batches_by_tokens, pad, translate
from samples.translation.student import Batch, Bits, Examination, Lessons, collate, count_words, hidden, logits, loss_to
from tools.marian import END, UNKNOWN
from tools.marian_model import Student, StudentShape, shift_right

SHAPE = StudentShape(vocabulary=60, hidden=32, heads=2, ffn=64, encoder_layers=1, decoder_layers=1)


@pytest.fixture(scope="module")
def teacher() -> Student:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        student = Student(SHAPE)
        with torch.no_grad():
            # Tied weights and residuals alone would repeat the last word.
            for name, parameter in student.named_parameters():
                if parameter.dim() == 2 and "embed" not in name:
                    parameter.mul_(4)
            student.lm_head.bias[END] += 2  # some lines end early, some late
    return student.eval()


def _sources(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.append(rng.integers(2, SHAPE.vocabulary, rng.integers(3, 9)), END) for _ in range(count)]


def _pairs(teacher: Student, count: int = 24) -> list[Pair]:
    sources = _sources(count)
    return [Pair(*pair) for pair in zip(sources, translate(teacher, sources), strict=True)]


def test_batches_hold_every_line_once_and_no_more_tokens() -> None:
    lengths = np.random.default_rng(0).integers(1, 40, 100)
    batches = list(batches_by_tokens(lengths, 80))
    assert sorted(np.concatenate(batches)) == list(range(100))
    assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= 80 for batch in batches)


def test_greedy_translations_are_what_teacher_forcing_says(teacher: Student) -> None:
    """Also where lines of a batch end at different steps."""
    sources = _sources(12)
    together = translate(teacher, sources)
    assert len({len(target) - 2 * len(source) for source, target in zip(sources, together, strict=True)}) > 2
    for source, target in zip(sources, together, strict=True):
        assert target[-1] == END
        assert UNKNOWN not in target
        (alone,) = translate(teacher, [source])
        np.testing.assert_array_equal(target, alone)
        ids, mask = pad([source])
        with torch.no_grad():
            found = teacher(ids, mask, shift_right(torch.from_numpy(target)[None]))[0]
        found[:, UNKNOWN] = -torch.inf
        # A line that found no end was ended by hand.
        np.testing.assert_array_equal(found.argmax(-1).numpy()[:-1], target[:-1])


def test_steps_have_their_own_batches(teacher: Student) -> None:
    pairs = _pairs(teacher)
    counts = count_words(pairs, SHAPE.vocabulary)
    lessons, again = (Lessons(pairs, counts, tokens=60, frequent=5, drawn=7) for _ in range(2))
    seen: list[Batch] = [lessons(step) for step in range(2 * lessons.steps_of_a_pass)]
    assert sum(len(batch.labels) for batch in seen) == 2 * len(pairs)
    for step in (3, 0, lessons.steps_of_a_pass + 1):
        torch.testing.assert_close(again(step).labels, seen[step].labels)
        torch.testing.assert_close(again(step).words, seen[step].words)
    for batch in seen:
        assert batch.words is not None
        assert batch.standing is not None
        assert len(set(batch.words.tolist())) == len(batch.words)
        torch.testing.assert_close(batch.words[batch.at], batch.labels)
        # What the words stand for is the whole vocabulary.
        assert float(batch.standing.exp().sum()) == pytest.approx(SHAPE.vocabulary, rel=1e-5)


def test_all_words_drawn_are_all_words(teacher: Student) -> None:
    pairs = _pairs(teacher)
    counts = count_words(pairs, SHAPE.vocabulary)
    batch = Lessons(pairs, counts, tokens=60, frequent=3, drawn=SHAPE.vocabulary)(0)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.mul_(1.1)
        whole = collate(pairs)
        read, wanted = hidden(student, whole), hidden(teacher, whole)
        labels = whole.labels[whole.label_mask.bool()]
        expected = distillation_loss(student.lm_head(read), teacher.lm_head(wanted), labels)
        torch.testing.assert_close(loss_to(teacher)(student, whole), expected)
        read = hidden(student, batch)
        assert batch.words is not None
        torch.testing.assert_close(logits(student, read, batch), student.lm_head(read)[:, batch.words])


def test_the_schedule_takes_every_matrix(teacher: Student) -> None:
    pairs = _pairs(teacher)
    counts = count_words(pairs, SHAPE.vocabulary)
    for bits in (Bits(), Bits(mean_planes=1.5)):
        student = copy.deepcopy(teacher)
        rules = [rule for block in bits.blocks(student, counts) for rule in block]
        encodings = project(student, rules)
        matrices = {name for name, tensor in student.named_parameters() if tensor.dim() == 2}
        assert set(encodings) == matrices
        words = encodings["encoder.embed_tokens.weight"].format
        assert words.mean_planes() <= (1.5 if bits.mean_planes else 2.5)
        assert encodings["decoder.layers.0.fc1.weight"].format.planes == (SHAPE.ffn,)
        assert len(encodings["encoder.layers.0.fc2.weight"].format.planes) == 4


def test_retraining_comes_nearer_to_the_teacher(teacher: Student) -> None:
    pairs = _pairs(teacher, 64)
    counts = count_words(pairs, SHAPE.vocabulary)
    student, examination = copy.deepcopy(teacher), Examination(teacher, pairs[:16])
    assert examination(teacher) == pytest.approx(0, abs=1e-6)
    rules = [rule for block in Bits().blocks(student, counts) for rule in block]
    result = retrain(
        student,
        [Phase(rules, 60, "straight-through", rate=2e-3, scale_rate=5e-3, validate_every=30)],
        Lessons(pairs, counts, tokens=200, frequent=20, drawn=20),
        loss_to(teacher),
        validate=examination,
    )
    assert result.loss is not None
    assert result.loss < 0.6 * result.history[0].loss
