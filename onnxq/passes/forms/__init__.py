"""Which form a weight takes in the graph."""

from __future__ import annotations

from onnxq.formats.uniform import UniformEncoding
from onnxq.passes.forms.base import Form, StoredWeight
from onnxq.passes.forms.kernel import KernelForm
from onnxq.passes.forms.stock import BlockForm, DequantizeForm, block_size, dequantize_refusal, stock_refusal

__all__ = ["BlockForm", "DequantizeForm", "Form", "KernelForm", "StoredWeight", "choose_form"]


def choose_form(
    encoding: UniformEncoding, *, stock: bool, opset: int, linear: bool, table: bool, accuracy_level: int
) -> tuple[Form, str]:
    """The form of a weight and, where it is not the one asked for, the reason.

    Args:
        encoding: the weight.
        stock: whether forms that stock ONNX Runtime runs fast are asked for.
        opset: version of the default domain.
        linear, table: what kinds of site read the weight.
        accuracy_level: activations of the kernel, as in MatMulNBits.

    Returns:
        The form, and a sentence for the report (empty when there is nothing to say).
    """
    kernel = KernelForm(accuracy_level)
    if not stock:
        return kernel, ""
    refusal = stock_refusal(encoding)
    if refusal is None and table and encoding.shape[1] % block_size(encoding):
        refusal = f"rows of {encoding.shape[1]} are not whole blocks of {block_size(encoding)}"
    if refusal is not None:
        return kernel, f"left as a function: {refusal}"
    if table or dequantize_refusal(encoding, opset):
        return BlockForm(), ""
    return DequantizeForm(), ""
