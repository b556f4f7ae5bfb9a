from __future__ import annotations

from pathlib import Path

import numpy as np

from onnxq.graph import find_weights, load
from onnxq.graph.shared import content_of, find_shared
from tests.pair import DECODER, ENCODER, TABLE, make_folder


def test_content_is_of_values_and_shape() -> None:
    matrix = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert content_of(matrix) == content_of(np.asfortranarray(matrix)) == content_of(matrix.astype(np.float64))
    assert content_of(matrix) != content_of(matrix.reshape(3, 2))
    assert content_of(matrix) != content_of(matrix + 1e-6)


def test_a_table_of_two_graphs_is_one_weight(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "pair")
    graphs = {name: load(folder / name).model for name in (ENCODER, DECODER)}
    shared = find_shared({name: find_weights(graph, Path(name).stem).weights for name, graph in graphs.items()})
    (table,) = (names for names in shared.holders.values() if len(names) > 1)
    assert table == ((ENCODER, "table"), (DECODER, "shared"))
    assert shared.contents[(ENCODER, "table")] == (content_of(TABLE),)
    (encoders,) = (weight for weight in shared.weights[ENCODER] if weight.name == "table")
    assert encoders.own_kinds == ("table",)
    assert set(encoders.kinds) == {"table", "linear"}
    assert encoders.part == "embedding"
    others = [weight for weight in shared.weights[ENCODER] if weight.name != "table"]
    assert [weight.kinds for weight in others] == [("linear",)] * 2
