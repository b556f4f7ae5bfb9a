"""What a model takes, and the check of one feed against it, before anything runs.

A feed is a mapping of input name to array. `InputChecker` gives back the feed in the model's own dtypes, or
raises `CalibrationError` that says what is wrong, where, why, and the way out.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxq.errors import CalibrationError

Feed = dict[str, np.ndarray]
"""One call's inputs: name -> array."""

_ORT_TYPES = {
    "float": np.float32,
    "double": np.float64,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "bool": np.bool_,
    "string": np.object_,
}


@dataclasses.dataclass(frozen=True)
class ModelInput:
    """One input of a model.

    Attributes:
        name: The input's name.
        dtype: What the model wants; None when the model does not say (anything passes).
        shape: One entry per dimension: an int is fixed, a name or None is free. None: the rank is not known.
        optional: True when the model runs without it (it has a default).
    """

    name: str
    dtype: np.dtype[Any] | None
    shape: tuple[int | str | None, ...] | None
    optional: bool = False

    def describe(self) -> str:
        """For messages: ``input_ids: int64 [batch, sequence]``."""
        dims = "any rank" if self.shape is None else str([("?" if d is None else d) for d in self.shape])
        return f"{self.name}: {self.dtype or 'any dtype'} {dims}".replace("'", "")


def model_inputs(model: ir.Model) -> tuple[ModelInput, ...]:
    """The inputs of an onnx-ir model; those that double as initializers are optional."""
    found = []
    for value in model.graph.inputs:
        assert value.name is not None
        dtype: np.dtype[Any] | None = None
        if value.dtype is not None:
            dtype = np.dtype(object) if value.dtype == ir.DataType.STRING else np.dtype(value.dtype.numpy())
        shape: tuple[int | str | None, ...] | None = None
        if value.shape is not None:
            shape = tuple(d if isinstance(d, int) else d.value for d in value.shape)
        found.append(ModelInput(value.name, dtype, shape, value.name in model.graph.initializers))
    return tuple(found)


def session_inputs(session: Any) -> tuple[ModelInput, ...]:
    """The inputs of an ``onnxruntime.InferenceSession``, for evaluation on a session that is open already."""
    found = []
    for node in session.get_inputs():
        element = node.type.removeprefix("tensor(").removesuffix(")")
        dtype = np.dtype(_ORT_TYPES.get(element, element))
        found.append(ModelInput(node.name, dtype, tuple(node.shape)))
    overridable = {n.name for n in session.get_overridable_initializers()}
    return tuple(dataclasses.replace(i, optional=i.name in overridable) for i in found)


class InputChecker:
    """Checks feeds against the inputs of one model and casts where nothing can be lost.

    Widening casts (int32 -> int64, float16 -> float32) are done and recorded in `casts`; every other difference
    of dtype is an error, since a narrowing cast can change what the model sees.
    """

    def __init__(self, inputs: Sequence[ModelInput]) -> None:
        self.inputs = {i.name: i for i in inputs}
        self.casts: dict[str, str] = {}

    def check_names(self, names: Sequence[str], where: str) -> None:
        """Refuse unknown and missing names; `where` is the file or batch for the message."""
        for name in names:
            if name not in self.inputs:
                near = difflib.get_close_matches(name, self.inputs, n=1)
                hint = f" Did you mean '{near[0]}'?" if near else ""
                raise CalibrationError(
                    f"{where}: '{name}' is not an input of the model.{hint} The model takes: {self._all()}. "
                    "Rename the array, or leave it out."
                )
        missing = [i for i in self.inputs.values() if not i.optional and i.name not in names]
        if missing:
            raise CalibrationError(
                f"{where}: the model's input {'; '.join(i.describe() for i in missing)} is missing, and the model "
                f"can't run without it. The data has: {', '.join(names) or 'nothing'}. Add an array of that name."
            )

    def check(self, feed: Mapping[str, Any], where: str) -> Feed:
        """The feed as arrays in the model's dtypes.

        Raises:
            CalibrationError: unknown or missing names, dtype, rank, a fixed dimension, no rows, NaN.
        """
        if not isinstance(feed, Mapping):
            raise CalibrationError(
                f"{where}: a feed must be a dict of input name -> array, not {type(feed).__name__}. "
                f"The model takes: {self._all()}."
            )
        self.check_names(list(feed), where)
        return {name: self.check_array(name, value, where) for name, value in feed.items()}

    def check_array(self, name: str, value: Any, where: str) -> np.ndarray:
        """One array of a feed, checked and cast; see `check`."""
        wanted = self.inputs[name]
        array = np.asarray(value)
        array = self._cast(wanted, array, where)
        self._check_shape(wanted, array, where)
        if np.issubdtype(array.dtype, np.floating) and array.size:
            bad = np.isnan(array)
            if bad.any():
                index = tuple(int(i) for i in np.argwhere(bad)[0])
                raise CalibrationError(
                    f"{where}: input '{name}' holds {int(bad.sum())} NaN, the first at index {list(index)}; one "
                    "NaN spoils every statistic behind it. Repair or drop that sample."
                )
        return array

    def _cast(self, wanted: ModelInput, array: np.ndarray, where: str) -> np.ndarray:
        if wanted.dtype is None or array.dtype == wanted.dtype:
            return array
        if wanted.dtype == object and array.dtype.kind in "US":
            return array.astype(object)
        if _widens(array.dtype, wanted.dtype):
            self.casts[wanted.name] = f"{wanted.name}: {array.dtype} -> {wanted.dtype}"
            return array.astype(wanted.dtype)
        raise CalibrationError(
            f"{where}: input '{wanted.name}' is {array.dtype}, the model wants {wanted.dtype}, and that cast can "
            f"lose values. Store it as {wanted.dtype} (array.astype('{wanted.dtype}')) if the values allow it."
        )

    def _check_shape(self, wanted: ModelInput, array: np.ndarray, where: str) -> None:
        if wanted.shape is None:
            return
        if array.ndim != len(wanted.shape):
            raise CalibrationError(
                f"{where}: input '{wanted.name}' has {array.ndim} dimensions {list(array.shape)}, the model wants "
                f"{len(wanted.shape)} ({wanted.describe()}). In an .npz the leading axis counts the samples; a feed "
                "carries the batch axis itself."
            )
        for axis, (have, want) in enumerate(zip(array.shape, wanted.shape, strict=True)):
            if isinstance(want, int) and have != want:
                raise CalibrationError(
                    f"{where}: input '{wanted.name}' has shape {list(array.shape)}, but the model fixes dimension "
                    f"{axis} to {want} ({wanted.describe()}). Pad or cut the data, set the batch size to the fixed "
                    "one, or export the model with a free dimension."
                )

    def _all(self) -> str:
        return "; ".join(i.describe() for i in self.inputs.values())


def _widens(have: np.dtype[Any], want: np.dtype[Any]) -> bool:
    """A cast that keeps every value and the kind: integer to wider integer, float to wider float."""
    same_kind = (np.issubdtype(have, np.integer) and np.issubdtype(want, np.integer)) or (
        np.issubdtype(have, np.floating) and np.issubdtype(want, np.floating)
    )
    return bool(same_kind) and np.can_cast(have, want, casting="safe")
