"""Which form a weight takes in the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

from onnxq.formats.binary import BinaryEncoding
from onnxq.formats.codebook import CodebookEncoding
from onnxq.formats.files import AnyEncoding
from onnxq.formats.float8 import Float8Encoding
from onnxq.formats.framed import FramedEncoding
from onnxq.formats.mixed import MixedEncoding
from onnxq.formats.uniform import ZeroPoint
from onnxq.graph import Site
from onnxq.passes.forms.base import Form, StoredWeight
from onnxq.passes.forms.binary import BinaryForm
from onnxq.passes.forms.codebook import CodebookForm
from onnxq.passes.forms.float8 import Float8Form, Float8QdqForm, qdq_refusal
from onnxq.passes.forms.framed import FramedForm
from onnxq.passes.forms.int8 import Int8DynamicForm, Int8StaticForm, int8_refusal
from onnxq.passes.forms.kernel import FLOAT_ACTIVATIONS, KernelForm
from onnxq.passes.forms.mixed import MixedForm
from onnxq.passes.forms.planes import PlanesForm, planes_refusal
from onnxq.passes.forms.stock import BlockForm, DequantizeForm, block_size, dequantize_refusal, stock_refusal

__all__ = [
    "BinaryForm",
    "BlockForm",
    "CodebookForm",
    "DequantizeForm",
    "Float8Form",
    "Float8QdqForm",
    "Form",
    "FramedForm",
    "KernelForm",
    "MixedForm",
    "PlanesForm",
    "Readers",
    "StoredWeight",
    "choose_form",
]


@dataclasses.dataclass(frozen=True)
class Readers:
    """Who reads a weight.

    Attributes:
        products: linear sites.
        tables: look-ups.
        nested: whether one of them stands in a branch or loop, where the weight is an outer-scope value.
    """

    products: int
    tables: int
    nested: bool

    @classmethod
    def of(cls, sites: Sequence[Site]) -> Readers:
        """The readers among the sites of a weight."""
        tables = sum(site.kind == "table" for site in sites)
        return cls(len(sites) - tables, tables, any(site.graph is not site.root.graph for site in sites))


def choose_form(
    encoding: AnyEncoding,
    *,
    stock: bool,
    opset: int,
    readers: Readers,
    accuracy_level: int,
    rounded: Literal["uint8", "dynamic", "float8"] | None = None,
) -> tuple[Form, str]:
    """The form of a weight and, where it is not the one asked for, the reason.

    Args:
        encoding: the weight.
        stock: whether forms that stock ONNX Runtime runs fast are asked for.
        opset: version of the default domain.
        readers: the sites of the weight.
        accuracy_level: activations of the kernel, as in MatMulNBits.
        rounded: what activations are rounded to: "uint8" or "float8" in front of the products, or "dynamic": to uint8
            by the products themselves. None leaves them alone.

    Returns:
        The form, and a sentence for the report (empty when there is nothing to say).
    """
    if isinstance(encoding, FramedEncoding):
        inner, note = choose_form(
            encoding.inner, stock=stock, opset=opset, readers=readers, accuracy_level=accuracy_level, rounded=rounded
        )
        return FramedForm(inner, stock), note
    if isinstance(encoding, CodebookEncoding):
        note = "left as a function: stock ONNX Runtime has no levels from tables" if stock else ""
        return CodebookForm(accuracy_level), note
    if isinstance(encoding, MixedEncoding):
        note = "left as a function: stock ONNX Runtime has no mixed depths" if stock else ""
        return MixedForm(accuracy_level), note
    if isinstance(encoding, BinaryEncoding):
        refusal = planes_refusal(encoding, opset)
        if stock and refusal is None:
            return PlanesForm(accuracy_level if rounded is None else FLOAT_ACTIVATIONS), ""
        return BinaryForm(accuracy_level), f"left as a function: {refusal}" if stock else ""
    if isinstance(encoding, Float8Encoding):
        refusal = qdq_refusal(opset, tables=readers.tables > 0)
        if stock and refusal is None:
            return Float8QdqForm(), ""
        return Float8Form(), f"left as a function: {refusal}" if stock else ""
    kernel = KernelForm(accuracy_level)
    if not stock:
        return kernel, ""
    if rounded in ("uint8", "dynamic") and not readers.tables and int8_refusal(encoding) is None:
        return Int8StaticForm() if rounded == "uint8" else Int8DynamicForm(), ""
    refusal = stock_refusal(encoding)
    if refusal is None and readers.tables and encoding.format.zero_point is ZeroPoint.MIDRISE:
        refusal = "look-ups need whole zero points"
    if refusal is None and readers.tables and encoding.shape[1] % block_size(encoding):
        refusal = f"rows of {encoding.shape[1]} are not whole blocks of {block_size(encoding)}"
    if refusal is not None:
        return kernel, f"left as a function: {refusal}"
    # ONNX Runtime fuses a DequantizeLinear whose codes have one reader, in the same graph.
    # Behind another Q/DQ pair it is not fused, and what would be fused rounds activations again.
    if rounded is not None:
        return BlockForm(flat=readers.tables > 0, accuracy_level=1), ""
    alone = readers.products == 1 and not readers.tables and not readers.nested
    if alone and dequantize_refusal(encoding, opset) is None:
        return DequantizeForm(), ""
    return BlockForm(flat=readers.tables > 0), ""
