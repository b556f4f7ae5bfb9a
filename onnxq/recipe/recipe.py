"""Recipes: a typed, frozen description of a run, from a preset or a YAML file, stored in the model it made.

Unknown keys are refused with the nearest valid name; values out of range with what is allowed. To add a
preset, add an entry to `_PRESETS`.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import yaml

from onnxq.errors import RecipeError
from onnxq.formats.codebook import CodebookFormat
from onnxq.formats.files import AnyFormat
from onnxq.formats.framed import FramedFormat
from onnxq.formats.tables import GAUSSIAN_TABLES
from onnxq.formats.uniform import UniformFormat, ZeroPoint

GroupSize = int | Literal["column"]
ZeroPointName = Literal["auto", "midrise", "integer", "per-group", "per-group-integer"]


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise RecipeError(f"{sentence}.")


def _nearest(word: str, valid: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _require_choice(value: Any, choices: Sequence[Any], where: str) -> None:
    if value not in choices:
        near = _nearest(str(value), [str(choice) for choice in choices])
        raise RecipeError(f"{where} is {value!r}; it must be one of {', '.join(map(str, choices))}.{near}")


def _require_choices(record: Any) -> None:
    """Check the fields that name one of several things: Python callers don't come past `Recipe.from_dict`."""
    for name, kind in typing.get_type_hints(type(record)).items():
        if typing.get_origin(kind) is Literal:
            _require_choice(getattr(record, name), typing.get_args(kind), name)


@dataclasses.dataclass(frozen=True)
class GridSpec:
    """A uniform grid.

    Attributes:
        bits: 1 to 8.
        group_size: weights along K that share a step: a multiple of 32, or "column".
        zero_point: see `onnxq.formats.uniform.ZeroPoint`; "auto" is the better of midrise and integer at 1 and
            2 bits and per-group above, and with target "stock" what stock ONNX Runtime can hold.
        window: levels of a table instead of equal steps, looked up by so many bits: the code's own and those of the
            codes before it (see `onnxq.formats.codebook`). For weights in a frame, which are Gaussian. Where there is
            no table (such as 7 bits, target "stock", weights that look-ups read), the grid is uniform.
    """

    bits: int = 4
    group_size: GroupSize = 64
    zero_point: ZeroPointName = "auto"
    window: int | None = None

    def __post_init__(self) -> None:
        _require_choices(self)
        _require(1 <= self.bits <= 8, f"bits is {self.bits}; it must be 1 to 8")
        size = self.group_size
        whole = size == "column" or (isinstance(size, int) and size >= 32 and size % 32 == 0)
        _require(whole, f'group_size is {self.group_size}; it must be a multiple of 32, or "column"')
        windows = sorted({window for _, window in GAUSSIAN_TABLES})
        valid = self.window is None or self.window in windows
        _require(valid, f"window is {self.window}; it must be one of {', '.join(map(str, windows))}, or null")

    def formats(self, target: str, *, tables: bool = True) -> tuple[UniformFormat | CodebookFormat, ...]:
        """The formats that the grid allows, all at one price; the solver keeps the one with the least loss.

        Args:
            target: see `Recipe`.
            tables: whether levels may come from a table: no look-up reads the weight.
        """
        group = None if self.group_size == "column" else self.group_size
        if self.window is not None and target != "stock" and tables and (self.bits, self.window) in GAUSSIAN_TABLES:
            # Equal steps are better where feedback is so strong that a table's range or its short runs don't suit.
            return CodebookFormat(self.bits, self.window, group), UniformFormat(self.bits, group, ZeroPoint.MIDRISE)
        return tuple(UniformFormat(self.bits, group, zero_point) for zero_point in self._zero_points(target))

    def _zero_points(self, target: str) -> tuple[ZeroPoint, ...]:
        if self.zero_point != "auto":
            return (ZeroPoint(self.zero_point),)
        if target == "stock" and self.bits in (2, 4, 8):
            return (ZeroPoint.PER_GROUP_INTEGER if self.bits == 8 else ZeroPoint.INTEGER,)
        if self.bits > 2:
            return (ZeroPoint.PER_GROUP,)
        # Levels about zero are best for most weights, but where one input is far louder than the others
        # its weight sets the step, and then only a grid that has zero can leave the others small.
        return ZeroPoint.MIDRISE, ZeroPoint.INTEGER


@dataclasses.dataclass(frozen=True)
class FrameSpec:
    """Round in the domain of a frame (`onnxq.frames`).

    Attributes:
        redundancy: coefficients per input, 1 to 8; 1 is a rotation. Numbers of coefficients are whole multiples of 32:
            the report says what became of it.
        output_redundancy: of a frame on the output side too; null for none. It costs a second transform.
    """

    redundancy: float = 1.0
    output_redundancy: float | None = None

    def __post_init__(self) -> None:
        for name in ("redundancy", "output_redundancy"):
            value = getattr(self, name)
            _require(value is None or 1 <= value <= 8, f"{name} is {value}; it must be 1 to 8, such as 1.125")

    def around(self, format: UniformFormat | CodebookFormat, seed: int) -> FramedFormat:
        """The format of the coefficients."""
        output = None if self.output_redundancy is None else _as_fraction(self.output_redundancy)
        return FramedFormat(format, _as_fraction(self.redundancy), output, seed)


def _as_fraction(value: float) -> Fraction:
    """1.1 is 11/10, whatever the float nearest to it."""
    return Fraction(value).limit_denominator(1000)


@dataclasses.dataclass(frozen=True)
class MixedSpec:
    """Depths of 0 to 8 bits inside each weight, which a budget chooses (`onnxq.formats.mixed`).

    Attributes:
        band: about so many outputs have depths of their own.
    """

    band: int = 512

    def __post_init__(self) -> None:
        _require(self.band >= 32, f"band is {self.band}; it must be 32 or more")


@dataclasses.dataclass(frozen=True)
class SolverSpec:
    """What chooses the codes.

    Attributes:
        name: "error-feedback" (GPTQ/LDLQ; needs calibration data) or "nearest".
        levels: "search" for the steps of least error, or published rules: "min-max" (GPTQ) levels span a row's range,
            "two-sigma" (FrameQuant) ones two of its standard deviations, and what lies outside is clipped. Rules need
            a grid of one group a column with per-group-integer zero points.
        damping: share of the mean diagonal that is added to the second moment's diagonal.
        order: in which order inputs are rounded, "activation" or "natural".
        refit: fit steps to the codes afterwards, under the whole second moment.
        sweeps: passes of coordinate descent over the codes that follow.
    """

    name: Literal["error-feedback", "nearest"] = "error-feedback"
    levels: Literal["search", "min-max", "two-sigma"] = "search"
    damping: float = 0.01
    order: Literal["activation", "natural"] = "activation"
    refit: bool = True
    sweeps: int = 0

    def __post_init__(self) -> None:
        _require_choices(self)
        _require(self.damping > 0, f"damping is {self.damping}; it must be above 0, such as 0.01")
        _require(self.sweeps >= 0, f"sweeps is {self.sweeps}; it must be 0 or more")


@dataclasses.dataclass(frozen=True)
class LinearPlan:
    """What happens to weights that products read, tied ones included.

    Attributes:
        grid: how they are stored.
        frame: the domain that they are stored in; null for their own.
        solver: what chooses the codes.
        activations: "int8" (fast) or "float32" (exact) activations of the kernel.
        mixed: depths that change inside a weight; null for one depth. `grid` then names the mean where no budget
            does, and serves stacks of weights and those that look-ups read too. Depths take the place of a frame.
    """

    grid: GridSpec = GridSpec()
    frame: FrameSpec | None = None
    solver: SolverSpec = SolverSpec()
    activations: Literal["int8", "float32"] = "int8"
    mixed: MixedSpec | None = None

    def __post_init__(self) -> None:
        _require_choices(self)
        self.require_levels(self.grid, "grid")
        _require(self.frame is None or self.mixed is None, "a plan has a frame or mixed depths, not both")
        searched = self.solver.levels == "search"
        _require(
            self.mixed is None or searched, f'levels {self.solver.levels!r} are of one depth; mixed ones need "search"'
        )

    def require_levels(self, grid: GridSpec, where: str) -> None:
        """Refuse a grid that the solver's rule of levels does not fit."""
        fits = grid.group_size == "column" and grid.zero_point == "per-group-integer" and grid.window is None
        _require(
            fits or self.solver.levels == "search",
            f"{where}: levels {self.solver.levels!r} need a grid of "
            'group_size "column" and zero_point "per-group-integer"',
        )


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """What happens to weights that only look-ups read.

    Attributes:
        grid: how their rows are stored; None leaves tables alone.
    """

    grid: GridSpec | None = GridSpec(bits=4, group_size=64)


@dataclasses.dataclass(frozen=True)
class Rule:
    """An exception by name; the first rule that matches decides.

    Attributes:
        match: a glob over weight names and site names, such as "*.layer.0.*".
        keep: leave the weight in float.
        grid: another grid.
    """

    match: str
    keep: bool = False
    grid: GridSpec | None = None

    def __post_init__(self) -> None:
        _require(self.keep != (self.grid is not None), f"the rule for {self.match!r} must say either keep or grid")


@dataclasses.dataclass(frozen=True)
class CalibrationSpec:
    """How calibration data is read.

    Attributes:
        max_samples: at most so many, drawn with the recipe's seed.
        batch_size: samples per run.
        max_length: tokens per text.
        sequential: gather statistics block by block, each from quantised predecessors; slower.
    """

    max_samples: int = 256
    batch_size: int = 8
    max_length: int = 256
    sequential: bool = False

    def __post_init__(self) -> None:
        for name in ("max_samples", "batch_size", "max_length"):
            _require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; it must be at least 1")


@dataclasses.dataclass(frozen=True)
class AllocationSpec:
    """How a budget (`--size`, `--bits`) weighs the errors of different weights.

    Attributes:
        sensitivity: "gradient": by what they do to the final outputs (`onnxq.sensitivity`); needs calibration data
            and torch, and the report says where one is missing. "layer": by each weight's own relative error.
        samples: at most so many of the calibration samples for the gradients.
    """

    sensitivity: Literal["gradient", "layer"] = "gradient"
    samples: int = 64

    def __post_init__(self) -> None:
        _require_choices(self)
        _require(self.samples >= 1, f"samples is {self.samples}; it must be 1 or more")


@dataclasses.dataclass(frozen=True)
class DistillationSpec:
    """A short training of scales, biases and norms after rounding (`onnxq.distillation`); needs torch.

    Attributes:
        steps: batches of calibration data to train on.
        rate: learning rate, relative to what is trained.
    """

    steps: int = 200
    rate: float = 0.01

    def __post_init__(self) -> None:
        _require(self.steps >= 1, f"steps is {self.steps}; it must be 1 or more")
        _require(0 < self.rate <= 1, f"rate is {self.rate}; it must be above 0 and at most 1, such as 0.01")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One run.

    Attributes:
        name: what it is called.
        description: what it is for, in a sentence.
        linear, tables: see `LinearPlan` and `TablePlan`.
        alternatives: other plans of products' weights; a budget takes for each weight the one that serves it best.
        rules: exceptions by name.
        min_elements: smaller weights stay in float.
        calibration: see `CalibrationSpec`.
        allocation: see `AllocationSpec`.
        distillation: see `DistillationSpec`; null for none.
        target: "kernel" (custom ops with function bodies) or "stock" (what stock ONNX Runtime runs fast).
        seed: of everything drawn at random.
    """

    name: str
    description: str = ""
    linear: LinearPlan = LinearPlan()
    tables: TablePlan = TablePlan()
    alternatives: tuple[LinearPlan, ...] = ()
    rules: tuple[Rule, ...] = ()
    min_elements: int = 4096
    calibration: CalibrationSpec = CalibrationSpec()
    allocation: AllocationSpec = AllocationSpec()
    distillation: DistillationSpec | None = None
    target: Literal["kernel", "stock"] = "kernel"
    seed: int = 0

    def __post_init__(self) -> None:
        _require_choices(self)
        _require(self.min_elements >= 0, f"min_elements is {self.min_elements}; it must be 0 or more")
        if self.target == "stock":
            mixed = any(plan.mixed for plan in (self.linear, *self.alternatives))
            _require(not mixed, 'target is "stock", which has no mixed depths: leave linear.mixed out, or use "kernel"')
            _require_whole_zeros(self.linear.grid, "linear.grid")
            for index, plan in enumerate(self.alternatives):
                _require_whole_zeros(plan.grid, f"alternatives[{index}].grid")
            _require_whole_zeros(self.tables.grid, "tables.grid")
            for index, rule in enumerate(self.rules):
                _require_whole_zeros(rule.grid, f"rules[{index}].grid")

    @property
    def chooses(self) -> bool:
        """Whether formats follow from a budget, so that there must be one."""
        return self.linear.mixed is not None or bool(self.alternatives)

    def formats(self, grid: GridSpec, *, products: bool, look_ups: bool) -> tuple[AnyFormat, ...]:
        """How a weight may be stored on a grid, all at one price.

        Args:
            grid: the grid.
            products, look_ups: what reads the weight. Frames are for products.
        """
        formats = grid.formats(self.target, tables=products and not look_ups)
        frame = self.linear.frame
        if frame is None or not products:
            return formats
        if look_ups:  # rows are looked up one by one: nothing may mix them
            frame = dataclasses.replace(frame, output_redundancy=None)
        if isinstance(formats[0], UniformFormat) and grid.zero_point == "auto":
            # Coefficients are Gaussian, so levels about zero are best; stock ONNX Runtime holds them for whole rows.
            held = grid.group_size == "column" and grid.bits in (2, 4) and not look_ups
            if self.target != "stock" or held:
                formats = (dataclasses.replace(formats[0], zero_point=ZeroPoint.MIDRISE),)
        return tuple(frame.around(format, self.seed) for format in formats)

    def rule_for(self, names: Sequence[str]) -> Rule | None:
        """The first rule that matches one of the names of a weight and its sites."""
        for rule in self.rules:
            if any(fnmatch.fnmatchcase(name, rule.match) for name in names):
                return rule
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data; tuples become lists."""
        plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return plain

    def to_yaml(self) -> str:
        """YAML that `from_yaml` reads back to an equal recipe."""
        text: str = yaml.safe_dump(self.to_dict(), sort_keys=False)
        return text

    def digest(self) -> str:
        """Equal for recipes that do the same: name and description don't count."""
        plain = self.to_dict()
        del plain["name"], plain["description"]
        return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_dict(cls, plain: Any) -> Recipe:
        """The recipe that plain data describes.

        Raises:
            RecipeError: an unknown key, a wrong type or a value out of range; the message names its place.
        """
        recipe: Recipe = _build(cls, plain, "recipe")
        return recipe

    @classmethod
    def from_yaml(cls, text: str) -> Recipe:
        """See `from_dict`."""
        try:
            return cls.from_dict(yaml.safe_load(text))
        except yaml.YAMLError as error:
            raise RecipeError(f"the recipe is not YAML: {error}") from error

    @classmethod
    def load(cls, name_or_path: str | Path) -> Recipe:
        """A preset by name, or a YAML file.

        Raises:
            RecipeError: neither; the message lists the presets.
        """
        if str(name_or_path) in _PRESETS:
            return _PRESETS[str(name_or_path)]
        path = Path(name_or_path)
        if not path.is_file():
            near = _nearest(str(name_or_path), list(_PRESETS))
            raise RecipeError(
                f"{str(name_or_path)!r} is neither a preset nor a file.{near} Presets: {', '.join(_PRESETS)}."
            )
        return cls.from_yaml(path.read_text())


def _require_whole_zeros(grid: GridSpec | None, where: str) -> None:
    """Refuse a grid that names zero points which stock ONNX Runtime has no place for."""
    if grid is None or grid.zero_point == "auto" or ZeroPoint(grid.zero_point).whole:
        return
    raise RecipeError(
        f'{where}.zero_point is {grid.zero_point}; with target "stock" zero points must be whole numbers: '
        '"integer", "per-group-integer", or "auto" to have one chosen.'
    )


def uniform_recipe(
    bits: int = 4,
    group_size: GroupSize = 64,
    *,
    table_bits: int | None = None,
    target: Literal["kernel", "stock"] = "kernel",
) -> Recipe:
    """The preset `uniform` at another width: `--width` and `--group-size` of the command line.

    Args:
        bits: of products' weights.
        group_size: of products' weights and tables.
        table_bits: of tables; None takes `bits`, but 4 at least.
        target: see `Recipe`.
    """
    base = _PRESETS["uniform"]
    return dataclasses.replace(
        base,
        linear=dataclasses.replace(base.linear, grid=GridSpec(bits, group_size)),
        tables=TablePlan(GridSpec(max(bits, 4) if table_bits is None else table_bits, group_size)),
        target=target,
    )


def presets() -> Mapping[str, Recipe]:
    """The presets by name."""
    return types.MappingProxyType(_PRESETS)


_PRESETS = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "uniform",
            "Uniform grids, error feedback from calibration data, 4 bits in groups of 64; see --width.",
        ),
        Recipe(
            "uniform-nearest",
            "Uniform grids, nearest rounding: no calibration data needed, good from 4 bits up.",
            linear=LinearPlan(solver=SolverSpec(name="nearest")),
        ),
        Recipe(
            "uniform-sequential",
            "As uniform, with statistics of each block taken behind the quantised ones before it.",
            calibration=CalibrationSpec(sequential=True),
        ),
        Recipe(
            "framequant",
            "2 bits: rotated weights, a trellis code of 16 levels, error feedback; more with --redundancy.",
            linear=LinearPlan(grid=GridSpec(2, "column", window=4), frame=FrameSpec()),
        ),
        Recipe(
            "framequant-paper",
            "2 bits as FrameQuant published it: frames of redundancy 1.125, two-sigma levels, integer zero points.",
            linear=LinearPlan(
                grid=GridSpec(2, "column", "per-group-integer"),
                frame=FrameSpec(1.125),
                solver=SolverSpec(levels="two-sigma", order="natural", refit=False),
            ),
        ),
        Recipe(
            "cvxq",
            "Depths of 0 to 8 bits inside each weight, spent by what they do to the outputs; to --size or --bits.",
            linear=LinearPlan(grid=GridSpec(3, "column"), mixed=MixedSpec()),
        ),
        Recipe(
            "auto",
            "The best of all formats for each weight, to --size or --bits (4 where neither is given).",
            linear=LinearPlan(),
            alternatives=(
                LinearPlan(grid=GridSpec(2, "column", window=4), frame=FrameSpec()),
                LinearPlan(grid=GridSpec(3, "column"), mixed=MixedSpec()),
            ),
        ),
    )
}


def _build(kind: Any, value: Any, where: str) -> Any:
    """Checks plain data against a type of this module and makes the value."""
    if dataclasses.is_dataclass(kind):
        return _build_record(kind, value, where)
    origin, choices = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _build_union(choices, value, where)
    if origin is Literal:
        _require_choice(value, choices, where)
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise RecipeError(f"{where} must be a list, not {value!r}.")
        return tuple(_build(choices[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise RecipeError(f"{where} must be {_plain_name(kind)}, not {value!r}.")
    return value


def _build_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    options = [choice for choice in choices if choice is not type(None)]
    errors = []
    for option in options:
        try:
            return _build(option, value, where)
        except RecipeError as error:
            errors.append(error)
    # A record's own complaint says more than "none of these types".
    raise (
        errors[0]
        if len(errors) == 1
        else RecipeError(f"{where} is {value!r}; it must be {' or '.join(_plain_name(option) for option in options)}.")
    )


def _build_record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where} must be a mapping of keys, not {value!r}.")
    hints = typing.get_type_hints(kind)
    fields = {field.name: field for field in dataclasses.fields(kind)}
    for key in value:
        if key not in fields:
            raise RecipeError(
                f"{where} has no key {key!r}.{_nearest(str(key), list(fields))} Valid keys: {', '.join(fields)}."
            )
    required = [name for name, field in fields.items() if field.default is dataclasses.MISSING]
    missing = [name for name in required if name not in value]
    if missing:
        raise RecipeError(f"{where} lacks {', '.join(missing)}.")
    try:
        return kind(**{key: _build(hints[key], item, f"{where}.{key}") for key, item in value.items()})
    except RecipeError as error:
        text = str(error)
        raise error if text.startswith(where) else RecipeError(f"{where}: {text}") from error


def _plain_name(kind: Any) -> str:
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
    if typing.get_origin(kind) is Literal:
        return " or ".join(repr(choice) for choice in typing.get_args(kind))
    return names.get(kind, getattr(kind, "__name__", str(kind)))
