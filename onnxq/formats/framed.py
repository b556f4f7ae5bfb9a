"""A format in a frame: what is stored is the weight's coefficients, and the layer's input is transformed to match.

    D ~ A_out W A_in^T  is stored in the inner format,        y = A_out^T (D (A_in x)),        W' = A_out^T D A_in

Frames belong to the model, not to a weight: weights that read one tensor share a frame, so its arrays (sign bits, a
small block) are priced apart, by `Frame.cost_bits`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

from onnxq.formats.codebook import CodebookEncoding, CodebookFormat
from onnxq.formats.uniform import UniformEncoding, UniformFormat
from onnxq.frames import Frame, frame_shape, make_frame

InnerFormat = UniformFormat | CodebookFormat
InnerEncoding = UniformEncoding | CodebookEncoding


@dataclasses.dataclass(frozen=True)
class FramedFormat:
    """An inner format and the redundancy of the frames around it.

    Attributes:
        inner: how coefficients are stored.
        redundancy: of the input side, 1 or more; `onnxq.frames.frame_shape` says what becomes of it.
        output_redundancy: of the output side; None leaves outputs as they are.
        seed: of the frames' signs.
    """

    inner: InnerFormat
    redundancy: Fraction = Fraction(1)
    output_redundancy: Fraction | None = None
    seed: int = 0

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.inner.bits

    def coefficients(self, n: int, k: int) -> tuple[int, int]:
        """(N', K') of the stored matrix of a weight [N, K]."""
        outputs = n if self.output_redundancy is None else frame_shape(n, self.output_redundancy).coefficients
        return outputs, frame_shape(k, self.redundancy).coefficients

    def cost_bits(self, n: int, k: int) -> int:
        """Bits on disk of a weight [N, K], without the frames' own arrays."""
        return self.inner.cost_bits(*self.coefficients(n, k))

    def label(self) -> str:
        """Short name for reports."""
        sides = f"frame {float(self.redundancy):.4g}"
        if self.output_redundancy is not None:
            sides += f" and {float(self.output_redundancy):.4g} on outputs"
        return f"{self.inner.label()} in {sides}"


@dataclasses.dataclass(frozen=True)
class FramedEncoding:
    """One weight [N, K] as coefficients.

    Attributes:
        format: what was asked for.
        inner: the stored matrix [N', K'].
        input_frame: of K inputs.
        output_frame: of N outputs, or None.
    """

    format: FramedFormat
    inner: InnerEncoding
    input_frame: Frame
    output_frame: Frame | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        outputs = self.inner.shape[0] if self.output_frame is None else self.output_frame.shape.size
        return outputs, self.input_frame.shape.size

    def dequantize(self) -> np.ndarray:
        """The weight that every runtime computes with, float32 [N, K]."""
        return from_frames(self.inner.dequantize(), self.input_frame, self.output_frame)

    def cost_bits(self) -> int:
        """Bits on disk, without the frames' own arrays, which weights share."""
        return self.format.cost_bits(*self.shape)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for a file."""
        kind = "codebook" if isinstance(self.inner, CodebookEncoding) else "uniform"
        ratios = [self.format.redundancy, self.format.output_redundancy or Fraction(0)]
        arrays = {
            "frame.kind": np.array(kind),
            "frame.format": np.array([(r.numerator, r.denominator) for r in ratios], np.int64),
            "frame.seed": np.array(self.format.seed),
        }
        for side, frame in (("input", self.input_frame), ("output", self.output_frame)):
            if frame is not None:
                arrays |= {f"{side}.{name}": array for name, array in frame.to_arrays().items()}
        return arrays | {f"inner.{name}": array for name, array in self.inner.to_arrays().items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> FramedEncoding:
        """Undoes `to_arrays`."""

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {name[len(prefix) :]: arrays[name] for name in arrays if name.startswith(prefix)}

        kind = CodebookEncoding if str(arrays["frame.kind"]) == "codebook" else UniformEncoding
        inner: InnerEncoding = kind.from_arrays(part("inner."))
        ratios = [Fraction(int(over), int(under)) for over, under in arrays["frame.format"]]
        format = FramedFormat(inner.format, ratios[0], ratios[1] or None, int(arrays["frame.seed"]))
        output = Frame.from_arrays(part("output.")) if ratios[1] else None
        return cls(format, inner, Frame.from_arrays(part("input.")), output)


def frames_of(format: FramedFormat, n: int, k: int) -> tuple[Frame, Frame | None]:
    """The frames of the inputs and, where the format has one there, of the outputs of a weight [N, K]."""
    inputs = make_frame(frame_shape(k, format.redundancy), format.seed)
    if format.output_redundancy is None:
        return inputs, None
    return inputs, make_frame(frame_shape(n, format.output_redundancy), format.seed)


def into_frames(weight: np.ndarray, input_frame: Frame, output_frame: Frame | None) -> np.ndarray:
    """A_out W A_in^T: float [N, K] to [N', K']."""
    coefficients = input_frame.analysis(weight)
    if output_frame is not None:
        coefficients = output_frame.analysis(np.ascontiguousarray(coefficients.T)).T
    return np.ascontiguousarray(coefficients)


def from_frames(coefficients: np.ndarray, input_frame: Frame, output_frame: Frame | None) -> np.ndarray:
    """A_out^T D A_in: float [N', K'] to [N, K]."""
    if output_frame is not None:
        coefficients = np.ascontiguousarray(output_frame.synthesis(np.ascontiguousarray(coefficients.T)).T)
    return input_frame.synthesis(coefficients)
