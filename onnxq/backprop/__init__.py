"""A differentiable interpreter of ONNX graphs in torch: gradients for initializers, activations and inputs.

Training and gradient statistics need the derivative of a graph that only exists as ONNX. The package onnx2torch
makes an nn.Module of a whole model: it copies every weight, and stops at an operator or a subgraph that it has no
module for; onnx-ad and onnxruntime-training write the backward pass as ONNX nodes, which needs a gradient rule per
operator and a runtime built for it. This interpreter runs the nodes one by one on torch tensors, so torch's autograd
gives every gradient, `If`, `Loop` and model-local functions are plain recursion, and weights stay memory-mapped.

Needs torch, from the extra ``onnxq[export]``; nothing else in onnxq imports this package before it is asked for it.
"""

from __future__ import annotations

from onnxq.errors import ModelError

try:
    import torch  # noqa: F401
except ImportError as error:
    raise ModelError("Gradients need torch, which is not installed: pip install 'onnxq[export]'.") from error

from onnxq.backprop.graph import TorchGraph
from onnxq.backprop.registry import MissingOp, missing_ops

__all__ = ["MissingOp", "TorchGraph", "missing_ops"]
