"""The float8 format: 8-bit floating-point codes, and a float16 scale for each output, group or whole weight.

    W[n, k] = gain * scale[n, g] * value(code[n, k]),    g = k // group_size

A code is a sign, an exponent E and a mantissa m of M bits:

    value = +-(1 + m / 2**M) * 2**(E - bias) where E > 0,  +-m / 2**M * 2**(1 - bias) where E = 0

Steps grow with the magnitude, so a weight loses the same share of itself wherever it lies: 31.5 dB with three mantissa
bits, 25.6 dB with two, whatever the tails. Groups add range and hardly accuracy. Codes that the types give to infinity
and NaN are never written, and the formula above reads them as the numbers that they would be.

Sources: Micikevicius et al., FP8 formats for deep learning (arXiv 2209.05433); the float8 types of the ONNX standard.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from onnxq.formats.packing import BLOCK_K, ceil_div

_CODE_BITS = 8
_SCALE_BITS = 16
_GAIN_BITS = 32
_MANTISSA_BITS_OF_FLOAT32 = 23
_BIAS_OF_FLOAT32 = 127
_EXPONENT_OF_FLOAT32 = np.int32(0x7F800000)


class Float8Kind(enum.Enum):
    """Which bits are exponent, and what the highest codes mean."""

    E4M3FN = "e4m3fn"
    """Up to 448, no infinities: for weights and activations."""
    E5M2 = "e5m2"
    """Up to 57344, the high byte of a float16: for what has a wide range."""
    E4M3FNUZ = "e4m3fnuz"
    """Up to 240, one zero and one NaN: half of what E4M3FN makes of the same code."""
    E5M2FNUZ = "e5m2fnuz"
    """Up to 57344, one zero and one NaN: half of what E5M2 makes of the same code."""

    @classmethod
    def of(cls, mantissa_bits: int, bias: int) -> Float8Kind:
        """The kind that the ops' attributes name.

        Raises:
            ValueError: there is none.
        """
        for kind in cls:
            if (kind.mantissa_bits, kind.bias) == (mantissa_bits, bias):
                return kind
        raise ValueError(f"no float8 kind has {mantissa_bits} mantissa bits and the exponent bias {bias}")

    @property
    def mantissa_bits(self) -> int:
        """M, 3 or 2."""
        return _KINDS[self][0]

    @property
    def bias(self) -> int:
        """Of the exponent."""
        return _KINDS[self][1]

    @property
    def largest(self) -> float:
        """The largest finite value."""
        return _KINDS[self][2]

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The type of ml_dtypes with these codes."""
        return np.dtype(_KINDS[self][3])

    def values(self) -> np.ndarray:
        """What each code is worth by the formula, float32 [256]."""
        codes = np.arange(256)
        exponent, mantissa = (codes & 0x7F) >> self.mantissa_bits, codes & ((1 << self.mantissa_bits) - 1)
        whole = np.where(exponent > 0, mantissa + (1 << self.mantissa_bits), mantissa)
        sizes = np.ldexp(whole.astype(np.float32), np.maximum(exponent, 1) - self.bias - self.mantissa_bits)
        signed: np.ndarray = np.where(codes < 128, sizes, -sizes)
        return signed

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Values of codes: uint8 [...] to float32 [...]."""
        values: np.ndarray = np.take(self.values(), codes)
        return values

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Codes of the nearest values, ties to even, what is too large to the largest: float32 [...] to uint8.

        Raises:
            ValueError: a value is NaN.
        """
        if np.isnan(values).any():
            raise ValueError("NaN has no float8 code: look for what made it")
        codes: np.ndarray = np.clip(values, -self.largest, self.largest).astype(self.dtype).view(np.uint8)
        return codes

    def round(self, values: np.ndarray) -> np.ndarray:
        """The values that `encode` gives codes to, much faster: float32 [...] to the same. NaN stays NaN.

        A sum with 1.5 * 2**23 steps has no bits left for less than a step, and rounds ties to even.
        """
        rounded: np.ndarray = np.clip(values, np.float32(-self.largest), np.float32(self.largest))
        power = rounded.view(np.int32) & _EXPONENT_OF_FLOAT32
        np.maximum(power, (1 - self.bias + _BIAS_OF_FLOAT32) << _MANTISSA_BITS_OF_FLOAT32, out=power)
        anchor = power.view(np.float32)
        anchor *= np.float32(1.5 * 2.0 ** (_MANTISSA_BITS_OF_FLOAT32 - self.mantissa_bits))
        rounded += anchor
        rounded -= anchor
        return rounded

    def unsafe(self, codes: np.ndarray) -> bool:
        """Whether some of the codes are infinity or NaN to those who read them as this type."""
        if self in (Float8Kind.E4M3FNUZ, Float8Kind.E5M2FNUZ):
            return bool((codes == 0x80).any())
        return bool(((codes & 0x7F) > self.encode(np.array([self.largest]))).any())


_KINDS: dict[Float8Kind, tuple[int, int, float, type]] = {
    Float8Kind.E4M3FN: (3, 7, 448.0, ml_dtypes.float8_e4m3fn),
    Float8Kind.E5M2: (2, 15, 57344.0, ml_dtypes.float8_e5m2),
    Float8Kind.E4M3FNUZ: (3, 8, 240.0, ml_dtypes.float8_e4m3fnuz),
    Float8Kind.E5M2FNUZ: (2, 16, 57344.0, ml_dtypes.float8_e5m2fnuz),
}


@dataclasses.dataclass(frozen=True)
class Float8Format:
    """Kind and scales.

    Attributes:
        kind: see `Float8Kind`.
        group_size: inputs along K that share a scale, a multiple of 32; None means a scale for each output.
        one_scale: one scale for the whole weight, as the FP8-BERT paper has it.
        powers_of_two: scales are powers of two.
    """

    kind: Float8Kind = Float8Kind.E4M3FN
    group_size: int | None = None
    one_scale: bool = False
    powers_of_two: bool = False

    def __post_init__(self) -> None:
        if self.group_size is not None and (self.group_size < BLOCK_K or self.group_size % BLOCK_K):
            raise ValueError(
                f"group_size must be a multiple of {BLOCK_K}, or None for a scale for each output, "
                f"not {self.group_size}"
            )
        if self.one_scale and self.group_size is not None:
            raise ValueError(f"one scale leaves no groups: group_size is None then, not {self.group_size}")

    def effective_group(self, k: int) -> int:
        """The group size for K inputs, at most K."""
        return k if self.group_size is None else min(self.group_size, k)

    def groups(self, k: int) -> int:
        """Number of groups in a row of K inputs; the last may be ragged."""
        return ceil_div(k, self.effective_group(k))

    def scale_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the scales of a weight [N, K]."""
        return (1, 1) if self.one_scale else (n, self.groups(k))

    def cost_bits(self, n: int, k: int) -> int:
        """Bits on disk of a weight [N, K]: codes, scales and gain."""
        rows, groups = self.scale_shape(n, k)
        return _CODE_BITS * n * k + _SCALE_BITS * rows * groups + _GAIN_BITS

    def label(self) -> str:
        """Short name for reports."""
        parts = ["float8", self.kind.value]
        if self.one_scale:
            parts.append("one scale")
        elif self.group_size is not None:
            parts.append(f"g{self.group_size}")
        return " ".join([*parts, "2**n"] if self.powers_of_two else parts)


@dataclasses.dataclass(frozen=True)
class Float8Encoding:
    """One weight [N, K] in a float8 format.

    Attributes:
        format: kind and scales.
        codes: uint8 [N, K], none of them infinity or NaN.
        scales: float16 [N, G], or [1, 1] when there is one; positive.
        gain: power of two that multiplies every scale.
    """

    format: Float8Format
    codes: np.ndarray
    scales: np.ndarray
    gain: float = 1.0

    def __post_init__(self) -> None:
        wanted = self.format.scale_shape(*self.codes.shape)
        if self.scales.shape != wanted:
            raise ValueError(
                f"{self.format.label()} of a {list(self.codes.shape)} weight needs scales {list(wanted)}, "
                f"not {list(self.scales.shape)}"
            )
        if (self.codes.dtype, self.scales.dtype) != (np.dtype(np.uint8), np.dtype(np.float16)):
            raise ValueError("codes must be uint8 and scales float16")
        if not (np.isfinite(self.scales).all() and (self.scales > 0).all()):
            raise ValueError("scales must be positive and finite")
        if self.format.kind.unsafe(self.codes):
            raise ValueError(f"some codes are infinity or NaN in {self.format.kind.value}")

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)."""
        return self.codes.shape[0], self.codes.shape[1]

    def effective_scales(self) -> np.ndarray:
        """Gain * scale, float32 [N, G] or [1, 1]."""
        effective: np.ndarray = self.scales.astype(np.float32) * np.float32(self.gain)
        return effective

    def dequantize(self) -> np.ndarray:
        """The weight that every runtime computes with, float32 [N, K]."""
        weight = self.format.kind.decode(self.codes)
        weight *= spread(self.effective_scales(), self.format, self.shape[1])
        return weight

    def cost_bits(self) -> int:
        """Bits on disk, everything counted."""
        return self.format.cost_bits(*self.shape)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Everything as named arrays, for a file."""
        layout = [self.format.group_size or 0, self.format.one_scale, self.format.powers_of_two]
        return {
            "codes": self.codes,
            "scales": self.scales,
            "float8": np.array(self.format.kind.value),
            "layout": np.array(layout, np.int64),
            "gain": np.array(self.gain),
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Float8Encoding:
        """Undoes `to_arrays`."""
        group_size, one_scale, powers_of_two = (int(value) for value in arrays["layout"])
        kind = Float8Kind(str(arrays["float8"]))
        format = Float8Format(kind, group_size or None, bool(one_scale), bool(powers_of_two))
        return cls(format, arrays["codes"], arrays["scales"], float(arrays["gain"]))


def spread(scales: np.ndarray, format: Float8Format, k: int) -> np.ndarray:
    """Scales of groups as those of inputs: [R, G] to [R, K], or as they are where a row has one."""
    if scales.shape[1] == 1:
        return scales
    return np.repeat(scales, format.effective_group(k), axis=1)[:, :k]
