"""Readable, stable names for weights: recipes and reports address them by these."""

from __future__ import annotations

import ast
import re

import onnx_ir as ir

# Names that exporters make up: onnx::MatMul_713, val_12, /fc/Constant_3_output_0, 1204, and what merging
# decoders appends.
_ANONYMOUS = re.compile(
    r"(onnx::\w+"
    r"|(val|t|v|x|w|b|tmp|const|constant|tensor|init|initializer|param|weight|view)?_?\d+"
    r"|(transpose|permute|cast|to|_to_copy)_?\d+"
    r"|.*_output_\d+"
    r"|.*Constant(_\d+)?)",
    re.IGNORECASE,
)
_MERGED = re.compile(r"_merged_\d+$")
_OPERATOR = re.compile(r"[/_.]?(MatMul|Gemm|Gather|Transpose)(_\d+)?$")
_MADE_UP_NODE = re.compile(r"(node_)?(MatMul|Gemm|Gather|linear|addmm|mm|embedding)?_?\d*", re.IGNORECASE)
_TORCH_SCOPES = "pkg.torch.onnx.name_scopes"


def weight_name(roots: list[ir.Value], nodes: list[ir.Node]) -> str:
    """The name of a weight: its first telling initializer's, else one made from where it is used.

    Args:
        roots: the stored copies, the preferred one first.
        nodes: the nodes that use it, in walking order.

    Returns:
        "model.embed_tokens.weight" (an initializer, without the suffix that merging decoders adds),
        "layers.0.self_attn.q_proj" (from a node), or as a last resort the anonymous initializer's own name.
        Not yet unique.
    """
    for root in roots:
        if root.name and root.producer() is None and is_telling(root.name):
            return _MERGED.sub("", root.name)
    for node in nodes:
        if name := node_path(node):
            return name
    return next((root.name for root in roots if root.name), "weight")


def is_telling(name: str) -> bool:
    """Whether a person gave the initializer its name, and not an exporter."""
    return not _ANONYMOUS.fullmatch(_MERGED.sub("", name))


def node_path(node: ir.Node) -> str:
    """The module that a node came from, with dots: "" when its name does not tell.

    "/layers.0/self_attn/q_proj/MatMul" gives "layers.0.self_attn.q_proj"; newer exporters name nodes by
    number and record the module path in the node's metadata.
    """
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_TORCH_SCOPES, "[]"))
        modules = [scope for scope in scopes[:-1] if scope]
    except (ValueError, SyntaxError, TypeError):
        modules = []
    if modules:
        return str(modules[-1])
    path = _OPERATOR.sub("", node.name or "")
    if _MADE_UP_NODE.fullmatch(node.name or "") or not path:
        return ""
    return path.strip("/").replace("/", ".")


def make_unique(names: list[str]) -> list[str]:
    """Number the second and later bearers of a name: "fc", "fc#2", "fc#3"."""
    taken = set(names)
    used: set[str] = set()
    result = []
    for name in names:
        candidate, count = name, 1
        while candidate in used or (count > 1 and candidate in taken):
            count += 1
            candidate = f"{name}#{count}"
        used.add(candidate)
        result.append(candidate)
    return result
