"""Weights in a frame: the transforms around the product of an inner form.

    x -> FrameAnalysis -> inner product -> (two-sided: FrameSynthesis) -> y

For stock ONNX Runtime the transforms are what the ops' bodies say, with their matrices stored: one product from each
side. Weights that read one tensor have equal analyses there, which `ShareTransformsPass` makes one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxq import ops
from onnxq.formats.framed import FramedEncoding
from onnxq.frames import Frame, FrameShape
from onnxq.passes.forms.base import Form, SharedArray, StoredWeight, constant, digest

TRANSFORM_PROPERTY = "onnxq.transform"
"""Metadata key of nodes that transform activations: equal ones in a graph may be merged."""
ARRAY_PREFIX = "onnxq.frame."
"""How the names of frames' arrays begin."""
FRAME_PROPERTY = "onnxq.frame"
"""Metadata key of the last node of an analysis and the first of a synthesis: numbers of inputs, before padding."""


@dataclasses.dataclass(frozen=True)
class FramedForm:
    """Transforms around an inner form.

    Attributes:
        inner: the form of the coefficients.
        stock: transforms in standard ops rather than our own.
    """

    inner: Form
    stock: bool = False

    @property
    def name(self) -> str:
        """See `Form.name`."""
        return f"{self.inner.name} in a frame"

    def arrays(self, encoding: FramedEncoding) -> dict[str, np.ndarray]:
        """See `Form.arrays`."""
        return self.inner.arrays(encoding.inner)

    def shared_arrays(self, encoding: FramedEncoding) -> dict[str, SharedArray]:
        """See `Form.shared_arrays`."""
        shared = dict(self.inner.shared_arrays(encoding.inner))
        for side, frame in _frames(encoding).items():
            arrays = frame.matrices() if self.stock else {"signs": frame.signs, "block": frame.block}
            for role, array in arrays.items():
                # Frames differ by their sizes and signs; a block or matrix may serve several.
                shared[f"{side}.{role}"] = SharedArray(f"{ARRAY_PREFIX}{role}.{digest(array)}", array)
        return shared

    def attributes(self, encoding: FramedEncoding) -> dict[str, Any]:
        """See `Form.attributes`."""
        sides = {side: frame.shape for side, frame in _frames(encoding).items()}
        return {"inner": self.inner.attributes(encoding.inner), "inner_shape": encoding.inner.shape, **sides}

    def linear(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight, bias: ir.Value | None) -> ir.Value:
        """See `Form.linear`."""
        u = self._analysis(tape, x, weight)
        if "output" not in weight.attributes:
            return self.inner.linear(tape, u, self._inner(weight), bias)
        v = self.inner.linear(tape, u, self._inner(weight), None)
        y = self._synthesis(tape, v, weight, "output")
        return y if bias is None else tape.op("Add", [y, bias])

    def table(self, tape: ir.tape.Tape, indices: ir.Value, weight: StoredWeight) -> ir.Value:
        """See `Form.table`: rows of W' are the synthesis of rows of D."""
        assert "output" not in weight.attributes, "plans give weights that look-ups read no frame on outputs"
        return self._synthesis(tape, self.inner.table(tape, indices, self._inner(weight)), weight, "input")

    def functions(self, weight: StoredWeight, *, linear: bool, table: bool) -> tuple[str, ...]:
        """See `Form.functions`."""
        inner = self.inner.functions(self._inner(weight), linear=linear, table=table)
        if self.stock:
            return inner
        synthesis = table or "output" in weight.attributes
        return (*inner, *("FrameAnalysis",) * linear, *("FrameSynthesis",) * synthesis)

    def _inner(self, weight: StoredWeight) -> StoredWeight:
        tensors = {role: value for role, value in weight.tensors.items() if "." not in role}
        return StoredWeight(
            weight.name, self.inner, weight.attributes["inner_shape"], weight.attributes["inner"], tensors
        )

    def _analysis(self, tape: ir.tape.Tape, x: ir.Value, weight: StoredWeight) -> ir.Value:
        shape: FrameShape = weight.attributes["input"]
        before = len(tape.nodes)
        if shape.padded > shape.size:
            x = _padded(tape, x, shape)
        if self.stock:
            signs, left, right = (weight.tensors[f"input.{role}"] for role in ("signs", "left", "right"))
            signed = tape.op("Mul", [x, signs])
            halves = tape.op("Reshape", [signed, _with_leading_of(tape, x, (shape.left, shape.middle * shape.odd))])
            mixed = tape.op("MatMul", [left, tape.op("MatMul", [halves, right])])
            u = tape.op("Reshape", [mixed, _with_leading_of(tape, x, (shape.coefficients,))])
        else:
            inputs = [x, weight.tensors["input.signs"], weight.tensors["input.block"]]
            u = tape.op("FrameAnalysis", inputs, _attributes(shape), domain=ops.DOMAIN)
        for node in list(tape.nodes)[before:]:
            node.metadata_props[TRANSFORM_PROPERTY] = "analysis"
        tape.nodes[-1].metadata_props[FRAME_PROPERTY] = str(shape.size)
        if x.shape is not None:
            u.shape = ir.Shape([*x.shape[:-1], shape.coefficients])
        return u

    def _synthesis(self, tape: ir.tape.Tape, v: ir.Value, weight: StoredWeight, side: str) -> ir.Value:
        shape: FrameShape = weight.attributes[side]
        if self.stock:
            signs, left, right = (weight.tensors[f"{side}.{role}"] for role in ("signs", "left", "right"))
            turned = tape.op("Transpose", [right], {"perm": [1, 0]})
            coefficients = shape.coefficients // shape.left
            halves = tape.op("Reshape", [v, _with_leading_of(tape, v, (shape.left, coefficients))])
            tape.nodes[-1].metadata_props[FRAME_PROPERTY] = str(shape.size)
            mixed = tape.op("MatMul", [left, tape.op("MatMul", [halves, turned])])
            y = tape.op("Mul", [tape.op("Reshape", [mixed, _with_leading_of(tape, v, (shape.padded,))]), signs])
        else:
            inputs = [v, weight.tensors[f"{side}.signs"], weight.tensors[f"{side}.block"]]
            y = tape.op("FrameSynthesis", inputs, _attributes(shape), domain=ops.DOMAIN)
            tape.nodes[-1].metadata_props[FRAME_PROPERTY] = str(shape.size)
        if shape.padded == shape.size:
            return y
        bounds = [constant(tape, np.array([value], np.int64)) for value in (0, shape.size, -1)]
        return tape.op("Slice", [y, *bounds])


def _frames(encoding: FramedEncoding) -> Mapping[str, Frame]:
    frames = {"input": encoding.input_frame}
    return frames if encoding.output_frame is None else {**frames, "output": encoding.output_frame}


def _attributes(shape: FrameShape) -> dict[str, int]:
    return {"left": shape.left, "middle": shape.middle, "odd": shape.odd}


def _padded(tape: ir.tape.Tape, x: ir.Value, shape: FrameShape) -> ir.Value:
    """The inputs x [..., size] with zeros behind them, [..., padded]."""
    more = shape.padded - shape.size
    if x.shape is not None:
        wide = tape.op("Pad", [x, constant(tape, np.array([0] * (2 * len(x.shape) - 1) + [more], np.int64))])
        wide.shape = ir.Shape([*x.shape[:-1], shape.padded])
        return wide
    # Pads count from the first axis, so where the rank is unknown the last has to be the second of two.
    flat = tape.op("Reshape", [x, constant(tape, np.array([-1, shape.size], np.int64))])
    wide = tape.op("Pad", [flat, constant(tape, np.array([0, 0, 0, more], np.int64))])
    return tape.op("Reshape", [wide, _with_leading_of(tape, x, (shape.padded,))])


def _with_leading_of(tape: ir.tape.Tape, x: ir.Value, tail: tuple[int, ...]) -> ir.Value:
    """A shape: the leading dimensions of x, all but the last, then `tail`."""
    if x.shape is not None:
        # 0 keeps what x has on that axis.
        return constant(tape, np.array([0] * (len(x.shape) - 1) + list(tail), np.int64))
    bounds = [constant(tape, np.array([value], np.int64)) for value in (0, -1, 0)]
    leading = tape.op("Slice", [tape.op("Shape", [x]), *bounds])
    return tape.op("Concat", [leading, constant(tape, np.array(tail, np.int64))], {"axis": 0})
