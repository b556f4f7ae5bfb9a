"""`TorchGraph`: an ONNX model that runs in torch, with overrides, taps and gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from onnxq.backprop.convert import from_numpy, widened
from onnxq.backprop.execution import Execution
from onnxq.backprop.names import TensorNames
from onnxq.backprop.plan import Operand, Plan, Wanted, plan_graph
from onnxq.errors import ModelError
from onnxq.graph.load import LoadedModel
from onnxq.graph.tensors import read_array


class TorchGraph:
    """A model that torch can run and differentiate.

    It runs on torch's default device; build and run it under one ``torch.device("cuda")`` to use a GPU.

    Numbers are those of the ONNX operators in float32 (float64 where the model says so): float16 and bfloat16 models
    are computed in float32. Integers, and so all shapes, are exact.

    Memory: stored tensors are read at first use and share the model's memory map, float32 ones for good, half
    precision ones widened for each use. Without gradients a run holds what is still to be read. With them it also
    holds what autograd keeps for the way back: every intermediate tensor between what requires a gradient and the
    outputs, weights that come from overrides included.

    Args:
        model: not changed; it must not change while this object is in use.
    """

    def __init__(self, model: LoadedModel | ir.Model) -> None:
        self.model = model.model if isinstance(model, LoadedModel) else model
        self._names = TensorNames(self.model)
        self._plans: dict[Wanted, Plan] = {}
        self._stored: dict[ir.Value, Tensor] = {}
        self._execution = Execution(self.model, self.constant)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's outputs."""
        return tuple(str(value.name) for value in self.model.graph.outputs)

    def key(self, value: ir.Value) -> str:
        """The name under which a tensor of the model is watched, tracked or replaced.

        It is the tensor's name; in a branch of an If, where names may repeat, ``if_node.then_branch/name``.

        Raises:
            ModelError: it is in a Loop's body or a model-local function, where one name stands for many tensors.
        """
        return self._names.key(value)

    def constant(self, value: ir.Value) -> Tensor:
        """An initializer, widened to float32 from half precision; not to be written to.

        Raises:
            ModelError: it has no data, or of a type that can't be computed with.
        """
        if value not in self._stored:
            if value.const_value is None:
                raise ModelError(f"the tensor '{value.name}' has no value: feed it, or check the export")
            try:
                self._stored[value] = from_numpy(read_array(value.const_value))
            except ModelError as error:
                raise ModelError(f"The initializer '{value.name}': {error}") from error
        return widened(self._stored[value])

    def run(
        self,
        feeds: Mapping[str, np.ndarray[Any, Any] | Tensor],
        *,
        values: Mapping[str, Tensor] | None = None,
        operands: Mapping[Operand, Tensor] | None = None,
        outputs: Collection[str] | None = None,
        watch: Collection[str] = (),
        track: Collection[str] = (),
    ) -> dict[str, Tensor]:
        """Run the model.

        Gradients flow from the results to every tensor given here that requires one, and to tracked ones; call it
        under ``torch.no_grad()`` where none are wanted.

        Args:
            feeds: the model's inputs by name; ones that no result needs may be left out.
            values: initializers or other tensors by `key`, and what stands for them. What only they needed is not run.
            operands: (node, input position) and what that node reads there, whatever its producer: for a weight that
                other nodes read in its stored form. In a function it holds for every call.
            outputs: which of the model's outputs to compute; None means all.
            watch: further tensors to return. One in a branch that was not taken is absent from the result.
            track: as `watch`; and where nothing before such a tensor requires a gradient, gradients start at it: it
                becomes a leaf. ``torch.autograd.grad`` of a result with respect to it then works in any case.

        Returns:
            Outputs, watched and tracked tensors by name. They may share memory with the model's weights: copy before
            writing.

        Raises:
            ModelError: an unknown name, a missing feed, an operator that is not known (see `missing_ops`), or one
                that fails; the message names the node.
        """
        graph = self.model.graph
        wished = frozenset(self.outputs if outputs is None else outputs)
        if unknown := sorted(wished - set(self.outputs)):
            raise ModelError(f"The model has no output {unknown}; it has {', '.join(self.outputs)}.")
        watched = {self._names.value(name): name for name in (*watch, *track)}
        tracked = {self._names.value(name) for name in track}
        given = {self._names.value(name): tensor for name, tensor in (values or {}).items()}
        wanted = Wanted(wished, frozenset(watched), frozenset(given), frozenset(operands or {}))
        if wanted not in self._plans:
            used = [i for i, value in enumerate(graph.outputs) if value.name in wished]
            self._plans[wanted] = plan_graph(graph, used, wanted)
        return self._execution.run(
            self._plans[wanted],
            self._fed(feeds),
            given=given,
            operands=operands or {},
            watched=watched,
            tracked=tracked,
        )

    def _fed(self, feeds: Mapping[str, np.ndarray[Any, Any] | Tensor]) -> dict[ir.Value, Tensor]:
        inputs = {str(value.name): value for value in self.model.graph.inputs}
        fed = {}
        for name, data in feeds.items():
            if name not in inputs:
                raise ModelError(f"The model has no input '{name}'; it takes {', '.join(inputs)}.")
            tensor = data if isinstance(data, torch.Tensor) else from_numpy(np.asarray(data))
            fed[inputs[name]] = widened(tensor)
        return fed
