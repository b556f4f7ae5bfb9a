"""Errors of the tensors inside: where in the network a candidate leaves its reference.

Both models are run with extra outputs for the tensors whose names they share, so this works wherever a
rewrite kept the names of node outputs. Memory: the tapped tensors of one batch, twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime as ort

from onnxq.errors import ModelError
from onnxq.evaluation.outputs import MASK, ErrorSums, OutputError, add_errors
from onnxq.evaluation.sessions import Feeds, library_available, run
from onnxq.runtime.session import session_options

TAPPED = (
    "MatMul",
    "Gemm",
    "Conv",
    "Add",
    "LayerNormalization",
    "RMSNormalization",
    "Gelu",
    "Softmax",
    "Gather",
)
"""Operators of the reference whose outputs are compared where no names are given."""

_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class LayerError:
    """Error of one tensor between.

    Attributes:
        position: Place of its node in the reference graph.
        operator: Type of that node.
        node: Name of that node.
    """

    position: int
    operator: str
    node: str
    error: OutputError


def compare_layers(
    reference: str | Path,
    candidate: str | Path,
    data: Iterable[Feeds],
    *,
    names: Sequence[str] | None = None,
    mask: str | None = MASK,
) -> tuple[LayerError, ...]:
    """Signal-to-noise of inner tensors that both models name alike, in the order of the reference graph.

    Args:
        reference, candidate: Paths of `.onnx` files. Tensors of the main graphs only, not of subgraphs.
        names: Tensors to compare; by default the outputs of all `TAPPED` nodes.
        mask: As in `compare_outputs`.

    Raises:
        ModelError: No common tensors, an unknown name, or no data.
    """
    left, right = _read(Path(reference)), _read(Path(candidate))
    makers = {
        output: (position, node) for position, node in enumerate(left.graph.node) for output in node.output if output
    }
    there = {output for node in right.graph.node for output in node.output}
    if names is None:
        wanted = [name for name, (_, node) in makers.items() if node.op_type in TAPPED and name in there]
    else:
        unknown = [name for name in names if name not in makers or name not in there]
        if unknown:
            raise ModelError(f"not a tensor of both models: {', '.join(unknown)}")
        wanted = sorted(names, key=lambda name: makers[name][0])
    if not wanted:
        raise ModelError("the two models share no tensor names: compare models rewritten from the same export")
    sessions = [_tapped(m, Path(p), wanted) for m, p in ((left, reference), (right, candidate))]
    sums: dict[str, ErrorSums] = {}
    for feeds in data:
        expected, got = (run(session, feeds) for session in sessions)
        chosen = {name: expected[name] for name in wanted}
        add_errors(sums, chosen, got, feeds.get(mask) if mask else None)
    if not sums:
        raise ModelError(
            "there is no data to compare the models on, or none of the tensors holds floating-point numbers"
        )
    return tuple(
        LayerError(makers[name][0], makers[name][1].op_type, makers[name][1].name, sums[name].error(name))
        for name in wanted
        if name in sums
    )


def _read(path: Path) -> onnx.ModelProto:
    if not path.is_file():
        raise ModelError(f"{path} is not a file: give the path of an .onnx file")
    proto = onnx.ModelProto()
    proto.ParseFromString(path.read_bytes())
    return proto


def _tapped(model: onnx.ModelProto, path: Path, names: Sequence[str]) -> ort.InferenceSession:
    """A session of `model` with `names` as further outputs. ONNX Runtime infers their types."""
    present = {output.name for output in model.graph.output}
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in present)
    options = session_options(library=library_available(), config={_EXTERNAL_FOLDER: str(path.resolve().parent)})
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
