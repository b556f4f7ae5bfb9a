"""The ways out that `onnxq doctor` names."""

from __future__ import annotations

import re

import onnx_ir as ir
import onnxruntime as ort

LIBRARY = "open it with the kernel library: `onnxq.session(path)`, or register `onnxq.library_path()` yourself"
ACCURACY = (
    "set accuracy_level 4 in the node, or for a fused DequantizeLinear leave the session option "
    "session.qdq_matmulnbits_accuracy_level at 4"
)
BLOCKS = "quantise with --group-size 32, 64 or 128"
FLOAT8 = (
    "quantise with `onnxq quantize --target kernel`: 8 bits in memory with the kernel library, expanded once without; "
    "or set the session option session.disable_quant_qdq=1 to expand this file's once (float32 speed and memory)"
)
TABLE = "store it so that only looked-up rows are decoded: `onnxq quantize` does, with either --target"
TRANSPOSED = "store it as [K, N] with axis 0, without Transpose behind it: `onnxq quantize --target stock` does"
SHARED = "give each product its own, or use MatMulNBits over one weight: `onnxq quantize --target stock` does"
FOLDED = "quantise the float model with `onnxq quantize`, whose nodes stay small in memory"
COPIED = "the kernel form reads one copy for both: `onnxq quantize --target kernel`, with the library"
OTHER = "leave this weight in float, or set the session option session.disable_quant_qdq=1 to expand it once"


def float_zero_points(bits: int) -> str:
    """For MatMulNBits with float zero points."""
    whole = "quantise with whole zero points (uint8)"
    return f"{whole}, or set the session option mlas.use_lut_gemm=1" if bits == 2 else whole


def decoding(ours: bool) -> str:
    """For nodes that unpack a weight at every call."""
    return LIBRARY if ours else "quantise the float model with `onnxq quantize`, which stores forms that have kernels"


def unfused(node: ir.Node) -> str:
    """For a DequantizeLinear in front of a product, when nothing simpler explains why it was not fused."""
    reasons = []
    block = node.attributes.get_int("block_size", 0)
    if node.attributes.get_int("axis", 1) != 0 and block:
        reasons.append("its axis is not 0")
    if block and (block < 16 or block & (block - 1)):
        reasons.append(f"its block_size {block} is no power of two from 16 on")
    if any(value is not None and value.const_value is None for value in node.inputs):
        reasons.append("its scales are not constant")
    why = f"{' and '.join(reasons)}: " if reasons else ""
    form = "store it as [K, N] with axis 0 and blocks of 32, 64 or 128"
    return f"{why}{form}: `onnxq quantize --target stock` does"


_WIDTHS = (
    "MatMulNBits takes 2, 4 and 8 bits only. Quantise again with one of these, or with "
    "`onnxq quantize --target kernel`, which has 1 to 8 bits."
)
_NO_BODIES = (
    "The model lost its function bodies, so it needs the kernel library: leave out --no-library. To run it "
    "without, quantise again and keep tools away that drop model-local functions."
)
_PER_CHANNEL = (
    "Constant folding fails on this model, as it does for per-channel 2-bit weights with zero points behind "
    "a Transpose. Quantise with groups: `onnxq quantize --target stock --group-size 32`."
)
_BRANCH = (
    "ONNX Runtime can't fuse a DequantizeLinear in a branch whose weight is in the outer graph: store it as "
    "MatMulNBits, or use `onnxq quantize --target kernel`."
)
_OUR_OPS = "LowBit|Codebook|Mixed|Float8|Binary|Frame"
_REFUSALS = (
    (r"nbits_ == 2 \|\| nbits_ == 4 \|\| nbits_ == 8", _WIDTHS),
    (
        r"does not support 8-bit weights with floating-point zero points",
        "Quantise again with whole zero points (uint8).",
    ),
    (
        rf"onnxq.*(not a registered function/op|No Op registered)|an implementation for ({_OUR_OPS})",
        _NO_BODIES,
    ),
    (
        r"is not a registered function/op|No Op registered",
        "An op of another domain needs its own library: register it in the session options.",
    ),
    (
        r"Opset \d+ is under development|opset version|Unsupported model IR version|ir_version",
        f"The model is newer than ONNX Runtime {ort.__version__}: update it, or export with --opset 21.",
    ),
    (
        r"NOT_IMPLEMENTED|Could not find an implementation",
        "This ONNX Runtime has no CPU kernel for that type: choose another format or execution provider.",
    ),
    (r"TransposeDQWeightsForMatMulNBits Missing required weight", _BRANCH),
    (r"onstant.?[Ff]olding|Transpose.*(int2|INT2)", _PER_CHANNEL),
    (
        r"external|GetFileLength|No such file",
        "The data file beside the model is missing or moved: put it where it was exported.",
    ),
)


def for_refusal(message: str) -> str:
    """ONNX Runtime's message in one line, and the way out where it is known."""
    line = re.sub(r"\s+", " ", message).strip()
    for pattern, cure in _REFUSALS:
        if re.search(pattern, line):
            return f"{line}\n{cure}"
    return f"{line}\nonnx.checker.check_model may say more; export a model that was edited by hand again."
