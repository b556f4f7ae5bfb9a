"""Float8 against 8-bit integers, weights and activations: what products lose, on real models and on a loud copy.

    python -m tools.tables.fp8 minilm minilm-loud vit smollm2 [--only PATTERN] [--list] [--markdown]

Every linear weight is quantised and, but for the weight-only line, what it is multiplied with; tables stay in float.
Files are of target "stock" and run as ONNX Runtime runs them. A loud copy computes what its model does: three inputs of
every product are 32 times louder there, and their weights 32 times smaller.

MiniLM is measured by two heads that were fitted to the float model's sentence embeddings and stay as they are:
Spearman's correlation with human ratings of film reviews (ridge), and the accuracy of their sign.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import functools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from rich.console import Console

import onnxq
from onnxq.calibration import CalibrationData
from onnxq.evaluation.similarity import embed, spearman
from onnxq.graph import find_weights, load
from onnxq.recipe import ActivationSpec, Float8Spec, GridSpec, LinearPlan, Recipe, SolverSpec, TablePlan
from tools.models import cache_folder, fetch
from tools.tables.results import cell_file, load_result, save_result, show_table
from tools.tables.subjects import SUBJECTS

TABLE = "fp8-1"
"""Results of another version of the methods are not taken up again."""
LOUD_INPUTS, LOUDNESS = 3, 32.0
"""A power of two: the copy's products are the model's, bit for bit but for the order of sums."""
TRAINING, HELD_OUT = 3000, 2000
RIDGE = 1.0


@dataclasses.dataclass(frozen=True)
class Cell:
    """What one cell shows: metrics by name, true bits of the weights, and the output's relative error."""

    metrics: dict[str, float]
    bits: float
    error: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Model:
    """A model under test.

    Attributes:
        path: its float ONNX file.
        calibration: opens the data for statistics.
        measure: metrics by name, from a session.
    """

    path: Path
    calibration: Callable[[], CalibrationData]
    measure: Callable[[ort.InferenceSession], dict[str, float]]


def methods() -> dict[str, LinearPlan | None]:
    """Lines of the table; None is the float model."""
    columns, whole = GridSpec(8, "column", "integer"), GridSpec(8, "weight", "integer")
    nearest = SolverSpec(name="nearest")
    return {
        "float32": None,
        "INT8 static, one scale a weight": LinearPlan(whole, solver=nearest, inputs=ActivationSpec("int8")),
        "INT8 static, a scale a column": LinearPlan(columns, solver=nearest, inputs=ActivationSpec("int8")),
        "INT8 dynamic": LinearPlan(columns, solver=nearest, inputs=ActivationSpec("int8", "dynamic")),
        "E4M3 static, as published": LinearPlan(
            solver=nearest, float8=Float8Spec(group_size="weight"), inputs=ActivationSpec()
        ),
        "E4M3 static": LinearPlan(float8=Float8Spec(), inputs=ActivationSpec()),
        "E4M3 by token": LinearPlan(float8=Float8Spec(), inputs=ActivationSpec(scale="token")),
        "E5M2 static": LinearPlan(float8=Float8Spec("e5m2"), inputs=ActivationSpec("e5m2")),
        "best of E4M3 and INT8": LinearPlan(columns, float8=Float8Spec(or_grid=True), inputs=ActivationSpec("auto")),
        "E4M3 weights only": LinearPlan(float8=Float8Spec()),
    }


def _reviews(name: str, most: int) -> tuple[list[str], np.ndarray]:
    """Film reviews with their mean human ratings."""
    texts, ratings = [], []
    for line in (fetch("reviews") / f"{name}.tsv").read_text(encoding="utf-8").splitlines():
        kind, _, rating, text = line.split("\t")
        if kind == "movie" and len(texts) < most:
            texts.append(text)
            ratings.append(float(rating))
    return texts, np.array(ratings)


def _feeds(
    texts: Sequence[str], tokenizer: Path, names: Sequence[str], batch: int = 16
) -> Iterator[dict[str, np.ndarray]]:
    from tokenizers import Tokenizer

    reader = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    reader.enable_padding()
    reader.enable_truncation(256)
    for start in range(0, len(texts), batch):
        rows = reader.encode_batch(list(texts[start : start + batch]))
        columns = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
        }
        yield {name: np.array(columns[name], np.int64) for name in names}


def _embeddings(session: ort.InferenceSession, texts: Sequence[str], tokenizer: Path) -> np.ndarray:
    names = [value.name for value in session.get_inputs()]
    return embed(session, _feeds(texts, tokenizer, names))


def _minilm(path: Path | None = None) -> Model:
    subject = SUBJECTS["minilm"]()
    folder = subject.model.parent
    train, train_ratings = _reviews("calibration", TRAINING)
    test, test_ratings = _reviews("heldout", HELD_OUT)

    @functools.cache
    def heads() -> np.ndarray:
        """Ridge regression of ratings, and of their signs, on the float model's embeddings."""
        session = ort.InferenceSession(subject.model, providers=["CPUExecutionProvider"])
        known = _with_one(_embeddings(session, train, folder))
        wanted = np.stack([train_ratings - train_ratings.mean(), np.sign(train_ratings)], axis=1)
        return np.linalg.solve(known.T @ known + RIDGE * np.eye(known.shape[1]), known.T @ wanted)

    def measure(session: ort.InferenceSession) -> dict[str, float]:
        guesses = _with_one(_embeddings(session, test, folder)) @ heads()
        decided = test_ratings != 0
        right = np.sign(guesses[decided, 1]) == np.sign(test_ratings[decided])
        return {
            "correlation": 100 * spearman(guesses[:, 0], test_ratings),
            "accuracy": 100 * float(right.mean()),
        }

    return Model(path or subject.model, subject.calibration, measure)


def _with_one(embeddings: np.ndarray) -> np.ndarray:
    return np.concatenate([embeddings.astype(np.float64), np.ones((len(embeddings), 1))], axis=1)


def _loud() -> Model:
    return _minilm(loud_copy(SUBJECTS["minilm"]().model, cache_folder() / "minilm-loud" / "model.onnx"))


def loud_copy(source: Path, path: Path) -> Path:
    """A model of the same function in which a few inputs of every product are loud; it stays in the cache."""
    if path.is_file():
        return path
    model = load(source).model
    rng = np.random.default_rng(0)
    louder: dict[int, ir.Value] = {}
    for weight in find_weights(model).weights:
        if weight.kinds != ("linear",):
            continue
        (site,) = weight.sites
        x = site.node.inputs[1 - site.weight_input]
        assert x is not None, "a product has two operands"
        if id(x) not in louder:
            scales = np.ones(weight.k, np.float32)
            scales[rng.choice(weight.k, LOUD_INPUTS, replace=False)] = LOUDNESS
            name = f"{x.name}.loud"
            scale = ir.Value(name=f"{name}.scales", const_value=ir.tensor(scales, name=f"{name}.scales"))
            model.graph.register_initializer(scale)
            node = ir.node("Mul", [x, scale], outputs=[ir.Value(name=name, shape=x.shape, type=x.type)])
            model.graph.insert_before(site.node, node)
            louder[id(x)] = node.outputs[0]
        value = louder[id(x)]
        scales = value.producer().inputs[1].const_value.numpy()  # type: ignore[union-attr]
        site.root.const_value = ir.tensor(site.layout.undo(weight.matrix() / scales), name=site.root.name)
        site.node.replace_input_with(1 - site.weight_input, value)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    ir.save(model, partial)
    partial.replace(path)
    return path


def _of_subject(name: str) -> Callable[[], Model]:
    def model() -> Model:
        subject = SUBJECTS[name]()
        metric = "perplexity" if name == "smollm2" else "accuracy"
        return Model(subject.model, subject.calibration, lambda session: {metric: subject.measure(session)})

    return model


MODELS: dict[str, Callable[[], Model]] = {
    "minilm": _minilm,
    "minilm-loud": _loud,
    "vit": _of_subject("vit"),
    "smollm2": _of_subject("smollm2"),
}


def run(model: Model, plan: LinearPlan | None) -> Cell:
    """Quantises and measures."""
    started = time.monotonic()
    if plan is None:
        metrics = model.measure(ort.InferenceSession(model.path, providers=["CPUExecutionProvider"]))
        return Cell(metrics, 32.0, 0.0, time.monotonic() - started)
    recipe = Recipe("table", linear=plan, tables=TablePlan(None), target="stock")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "model.onnx"
        report = onnxq.quantize(model.path, out, recipe=recipe, calibration=model.calibration())
        metrics = model.measure(ort.InferenceSession(out, options, providers=["CPUExecutionProvider"]))
    assert report.check is not None
    assert report.linear_bits is not None
    error = next(iter(report.check.relative_errors.values()))
    return Cell(metrics, report.linear_bits, error, time.monotonic() - started)


def fill(name: str, only: Sequence[str], console: Console) -> None:
    """Computes the cells that are asked for and not known."""
    model: Model | None = None
    for method, plan in methods().items():
        label, file = f"{name} {method}", cell_file(TABLE, name, method, 8)
        if file.is_file() or not any(fnmatch.fnmatchcase(label, pattern) for pattern in only):
            continue
        model = model or MODELS[name]()
        cell = run(model, plan)
        save_result(file, cell)
        console.print(f"{label}: {_metrics(cell.metrics)}, error {cell.error:.4f}, {cell.seconds:.0f} s")


def _metrics(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def show(names: Sequence[str], console: Console, *, markdown: bool) -> None:
    """One line a method; cells that are not known are empty."""
    rows = []
    for method in methods():
        found = [load_result(cell_file(TABLE, name, method, 8), Cell) for name in names]
        rows.append(
            [method, *("" if cell is None else f"{_metrics(cell.metrics)} ({cell.error:.2%})" for cell in found)]
        )
    show_table("float8 and INT8", ["method", *names], rows, "metric (output error)", console, markdown=markdown)


def main() -> None:
    """Fills and shows the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="+", choices=tuple(MODELS))
    parser.add_argument("--only", nargs="+", default=["*"], help="patterns over 'model method'")
    parser.add_argument("--list", action="store_true", help="show what is known and compute nothing")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    arguments = parser.parse_args()
    console = Console(width=200)
    if not arguments.list:
        for name in arguments.models:
            fill(name, arguments.only, console)
    show(arguments.models, console, markdown=arguments.markdown)


if __name__ == "__main__":
    main()
