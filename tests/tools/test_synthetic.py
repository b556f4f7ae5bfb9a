from __future__ import annotations

import importlib.util
import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxq.errors import OutputExistsError
from tools import synthetic
from tools.synthetic import StackShape

TINY = StackShape(layers=2, hidden=16, ffn=24, vocabulary=50)


def test_large_model_is_valid_and_runs(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    written = synthetic.write_large_model(path, TINY)
    assert written == path.stat().st_size + (tmp_path / "m.onnx.data").stat().st_size
    onnx.checker.check_model(str(path), full_check=True)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"input_ids": np.array([[1, 2, 49]])})
    assert logits.shape == (1, 3, 50)
    assert np.isfinite(logits).all()


def test_weights_are_seeded_external_and_counted(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        synthetic.write_large_model(
            tmp_path / f"{name}.onnx", StackShape(layers=1, hidden=16, ffn=24, vocabulary=50, seed=seed)
        )
    a, b, c = ((tmp_path / f"{name}.onnx.data").read_bytes() for name in "abc")
    assert a == b != c
    model = onnx.load(tmp_path / "a.onnx", load_external_data=False)
    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    assert sum(int(np.prod(t.dims)) for t in external) == StackShape(layers=1, hidden=16, ffn=24, vocabulary=50).weights
    assert all(int(e.value) % synthetic.ALIGNMENT == 0 for t in external for e in t.external_data if e.key == "offset")


def test_existing_files_are_kept(tmp_path: Path) -> None:
    (tmp_path / "m.onnx.data").write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match="exists"):
        synthetic.write_large_model(tmp_path / "m.onnx", TINY)
    assert (tmp_path / "m.onnx.data").read_bytes() == b"mine"


def test_writing_holds_a_piece_not_the_model(tmp_path: Path) -> None:
    shape = StackShape(layers=3, hidden=1024, ffn=2048, vocabulary=4096)
    tracemalloc.start()
    try:
        written = synthetic.write_large_model(tmp_path / "m.onnx", shape)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert written > 140e6
    # A piece of 2**20 draws in float64, its scaled copies and its bytes.
    assert peak < 40e6


def test_weights_have_heavy_tails_and_outlier_rows() -> None:
    rng = np.random.default_rng(0)
    matrix = np.concatenate(list(synthetic.student_t(rng, 2000, 600, 5.0, np.array([3]))))
    assert matrix.shape == (2000, 600)
    assert matrix.dtype == np.float32
    quiet = np.delete(matrix, 3, axis=0) * np.sqrt(2000)
    assert 0.95 < quiet.std() < 1.05
    assert np.abs(quiet).max() > 8
    assert matrix[3].std() > 8 / np.sqrt(2000)


SMALL = synthetic.TransformerShape(layers=1, hidden=32, heads=2, ffn=48, vocabulary=97, positions=32)


@pytest.mark.parametrize(
    ("kind", "graphs"),
    [("encoder-decoder", ["decoder_model_merged.onnx", "encoder_model.onnx"]), ("decoder", ["model.onnx"])],
)
def test_built_models_export_with_one_tied_weight(kind: str, graphs: list[str], tmp_path: Path) -> None:
    pytest.importorskip("optimum.exporters.onnx")
    result = synthetic.export_built(kind, SMALL, tmp_path / "out")
    assert [g.path.name for g in result.graphs] == graphs
    merged = onnx.load(result.graphs[0].path)
    tables = [
        list(t.dims)
        for t in merged.graph.initializer
        if SMALL.vocabulary in t.dims and len(t.dims) == 2 and 1 not in t.dims
    ]
    assert tables == [[97, 32]]
    # Where accelerate is installed, optimum ties the weights itself, and nothing is left for us to share.
    if importlib.util.find_spec("accelerate") is None:
        assert "onnx::" in result.graphs[0].shared[0]
    assert all(d.relative < 1e-4 for g in result.graphs for d in g.differences)
