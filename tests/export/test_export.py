from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from onnxq.errors import ExportError, OutputExistsError
from onnxq.export import ModuleSource, export, exporter
from onnxq.export.verify import Comparison

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("optimum.exporters.onnx")

FLOAT32_NOISE = 1e-5
"""Relative difference between two float32 evaluations of a small network."""


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of 2 layers with random weights, as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=101,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
    )
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "notes.md").write_text("stays behind")
    return folder


@pytest.fixture(scope="module")
def exported(bert: Path, tmp_path_factory: pytest.TempPathFactory):
    return export(bert, tmp_path_factory.mktemp("out") / "bert", task="feature-extraction")


def test_bert_has_its_sites_and_nothing_else(exported) -> None:
    (graph,) = exported.graphs
    model = onnx.load(graph.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 21)]
    weights = {t.name: list(t.dims) for t in model.graph.initializer}
    sites = [n for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
    assert len(sites) == 2 * 6
    tables = [n for n in model.graph.node if n.op_type == "Gather" and len(weights.get(n.input[0], [])) == 2]
    assert len(tables) == 3
    assert graph.operators["LayerNormalization"] == 5
    assert graph.operators["Gelu"] == 2


def test_weights_carry_their_parameters_names(exported, bert: Path) -> None:
    model = onnx.load(exported.graphs[0].path)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    name = "encoder.layer.1.intermediate.dense.weight"
    parameter = transformers.BertModel.from_pretrained(bert).state_dict()[name].numpy()
    np.testing.assert_array_equal(stored[name], parameter.T)
    assert not [
        n for n, value in stored.items() if n.startswith("onnx::") and value.ndim == 2 and value.dtype == np.float32
    ]


def test_export_is_compared_with_torch(exported, bert: Path) -> None:
    (difference,) = exported.graphs[0].differences
    assert difference.name == "last_hidden_state"
    assert 0 < difference.relative < FLOAT32_NOISE
    ids = np.array([[5, 6, 7, 8, 9, 10, 11]])
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    session = ort.InferenceSession(str(exported.graphs[0].path), providers=["CPUExecutionProvider"])
    model = transformers.BertModel.from_pretrained(bert).eval()
    with torch.inference_mode():
        expected = model(**{k: torch.from_numpy(v) for k, v in feeds.items()}).last_hidden_state.numpy()
    np.testing.assert_allclose(session.run(None, feeds)[0], expected, atol=1e-5)


def test_tokenizer_and_config_are_carried(exported) -> None:
    assert {"config.json", "tokenizer.json"} <= set(exported.carried)
    assert not (exported.folder / "notes.md").exists()
    assert not list(exported.folder.glob("*.safetensors"))


def test_no_trace_of_the_exporting_machine(exported, bert: Path) -> None:
    content = exported.graphs[0].path.read_bytes()
    for trace in (str(bert), str(Path(torch.__file__).parent), str(Path(__file__).parent)):
        assert trace.encode() not in content


def test_taken_folder_is_kept_unless_forced(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(OutputExistsError, match="not empty"):
        export(bert, out)
    assert (out / "mine").read_text() == "mine"
    result = export(bert, out, opset=18, force=True, verify=False)
    assert not (out / "mine").exists()
    assert result.graphs[0].opset == 18
    assert result.graphs[0].unverified == "verification was turned off"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_failed_export_leaves_nothing_and_keeps_what_was_there(bert: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(ExportError, match="differs from torch"):
        export(bert, out, force=True, tolerance=0.0)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in out.iterdir()] == ["mine"]


def test_weights_that_would_be_random_are_refused(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"classifier\.weight.*random numbers"):
        export(bert, tmp_path / "out", task="text-classification")


def test_unknown_task_names_those_there_are(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="feature-extraction"):
        export(bert, tmp_path / "out", task="poetry")


def test_sources_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="downloads no models"):
        export("someone/some-model", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match=r"no config\.json"):
        export(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ExportError, match="holds the source"):
        export(tmp_path / "empty", tmp_path, force=True)
    with pytest.raises(ExportError, match="opset 16"):
        export(tmp_path / "empty", tmp_path / "out", opset=16)


def test_missing_extra_names_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporter.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install onnxq\[export\]"):
        exporter.require_extra()


class Tied(torch.nn.Module):
    """A table and an output layer with the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(60, 24)
        self.inner = torch.nn.Linear(24, 24)
        self.head = torch.nn.Linear(24, 60, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.inner(self.table(ids))))


def test_module_export(tmp_path: Path) -> None:
    torch.manual_seed(0)
    source = ModuleSource(
        Tied(), {"ids": torch.arange(12).reshape(3, 4)}, ("logits",), {"ids": {0: "batch", 1: "tokens"}}
    )
    result = export(source, tmp_path / "out")
    (graph,) = result.graphs
    assert graph.differences[0].relative < FLOAT32_NOISE
    model = onnx.load(graph.path)
    assert [list(t.dims) for t in model.graph.initializer if 60 in t.dims] == [[60, 24]]
    session = ort.InferenceSession(str(graph.path), providers=["CPUExecutionProvider"])
    ids = np.arange(7)[None]
    with torch.inference_mode():
        expected = source.module(torch.from_numpy(ids)).numpy()
    np.testing.assert_allclose(session.run(None, {"ids": ids})[0], expected, atol=1e-5)
    assert str(Path(__file__).parent).encode() not in graph.path.read_bytes()


def test_module_refusals(tmp_path: Path) -> None:
    inputs = {"ids": torch.arange(12).reshape(3, 4)}
    with pytest.raises(ExportError, match="opset 18"):
        export(ModuleSource(Tied(), inputs), tmp_path / "out", opset=17)
    with pytest.raises(ExportError, match="no inputs"):
        export(ModuleSource(Tied(), inputs, dynamic_axes={"words": {0: "batch"}}), tmp_path / "out")


def test_comparison_refuses_other_shapes_and_lost_numbers() -> None:
    comparison = Comparison()
    comparison.add("y", np.array([1.0, -4.0]), np.array([1.0, -3.0]))
    comparison.add("y", np.array([0.0, np.inf]), np.array([0.5, np.inf]))
    (difference,) = comparison.differences()
    assert (difference.max_abs, difference.relative) == (1.0, 0.25)
    with pytest.raises(ExportError, match="baked in"):
        comparison.add("y", np.zeros((2, 3)), np.zeros((2, 4)))
    with pytest.raises(ExportError, match="finite"):
        comparison.add("y", np.zeros(2), np.array([0.0, np.nan]))
