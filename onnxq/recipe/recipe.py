"""Recipes and presets. To add a preset, add an entry to `_PRESETS`."""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import json
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml

from onnxq.errors import RecipeError
from onnxq.formats.files import AnyFormat
from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.recipe.build import build
from onnxq.recipe.checks import nearest_name, require, require_choices
from onnxq.recipe.plans import ActivationSpec, LinearPlan, Rule, SolverSpec, TablePlan
from onnxq.recipe.settings import AllocationSpec, CalibrationSpec, DistillationSpec
from onnxq.recipe.storage import BinarySpec, Float8Spec, FrameSpec, GridSpec, GroupSize, MixedSpec, WordSpec


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
        require_choices(self)
        alike = all(plan.inputs == self.linear.inputs for plan in self.alternatives)
        require(alike, "all plans of a recipe have the same inputs: alternatives differ from linear in theirs")
        plans = (self.linear, *self.alternatives)
        plain = self.distillation is None or not any(plan.float8 or plan.binary for plan in plans)
        require(plain, "distillation moves the scales of integer codes; leave it, or float8 and binary, out")
        require(self.min_elements >= 0, f"min_elements is {self.min_elements}; it must be 0 or more")
        if self.target == "stock":
            none = not any(plan.mixed for plan in plans)
            require(none, 'target is "stock", which has no mixed depths: leave linear.mixed out, or use "kernel"')
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

    @property
    def counts_words(self) -> bool:
        """Whether planes of tables follow from how often tokens occur."""
        codes = [self.tables.binary, *(plan.binary for plan in (self.linear, *self.alternatives))]
        codes += [rule.binary for rule in self.rules]
        return any(spec is not None and spec.words is not None for spec in codes)

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
        recipe: Recipe = build(cls, plain, "recipe")
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
            near = nearest_name(str(name_or_path), list(_PRESETS))
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


_INT8_COLUMNS = GridSpec(8, "column", "integer")
_POSITIONS = Rule("part:positions", keep=True)
_CLUSTERS = WordSpec("frequency")
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
            "fp8",
            "Weights and activations in E4M3 as FP8-BERT has them; --target stock writes QDQ for GPUs and NPUs.",
            linear=LinearPlan(float8=Float8Spec(), inputs=ActivationSpec()),
            tables=TablePlan(float8=Float8Spec()),
        ),
        Recipe(
            "fp8-int8",
            "As fp8, with 8-bit integers for each weight and each activation that they serve better.",
            linear=LinearPlan(_INT8_COLUMNS, float8=Float8Spec(or_grid=True), inputs=ActivationSpec("auto")),
            tables=TablePlan(GridSpec(8, "column", "per-group-integer")),
        ),
        Recipe(
            "fp8-weight-only",
            "Weights in E4M3, activations as they are: no calibration data needed, better with it.",
            linear=LinearPlan(float8=Float8Spec()),
            tables=TablePlan(float8=Float8Spec()),
        ),
        Recipe(
            "int8",
            "8-bit integers for weights, by column, and activations, with static scales, for stock ONNX Runtime.",
            linear=LinearPlan(_INT8_COLUMNS, solver=SolverSpec(name="nearest"), inputs=ActivationSpec("int8")),
            tables=TablePlan(GridSpec(8, "column", "per-group-integer")),
            target="stock",
        ),
        Recipe(
            "int8-dynamic",
            "As int8, with scales of activations taken as they come: no calibration data needed.",
            linear=LinearPlan(
                _INT8_COLUMNS, solver=SolverSpec(name="nearest"), inputs=ActivationSpec("int8", "dynamic")
            ),
            tables=TablePlan(GridSpec(8, "column", "per-group-integer")),
            target="stock",
        ),
        Recipe(
            "binary",
            "Binary codes: 3 planes of signs, a scale of each for every row, error feedback; 4 planes in tables.",
            linear=LinearPlan(binary=BinarySpec(3)),
            tables=TablePlan(binary=BinarySpec(4)),
        ),
        Recipe(
            "nmt",
            "Translation and speech: binary codes or grids by sub-layer, planes for each word; to --size or --bits.",
            linear=LinearPlan(GridSpec(3), binary=BinarySpec(3, words=WordSpec())),
            tables=TablePlan(binary=BinarySpec(4, words=WordSpec())),
            alternatives=(LinearPlan(),),
            rules=(_POSITIONS,),
            allocation=AllocationSpec(samples=24, read_weight=1.0),
        ),
        Recipe(
            "nmt-int8-encoder",
            "As nmt, with 8-bit integers in the encoder, which runs once for a sentence.",
            linear=LinearPlan(GridSpec(3), binary=BinarySpec(3, words=WordSpec())),
            tables=TablePlan(binary=BinarySpec(4, words=WordSpec())),
            alternatives=(LinearPlan(),),
            rules=(_POSITIONS, Rule("part:encoder.*", grid=GridSpec(8, "column"))),
            allocation=AllocationSpec(samples=24, read_weight=1.0),
        ),
        Recipe(
            "nmt-paper",
            "Binary codes as published for translation: 1 to 4 bits by sub-layer, by word; made for --encodings.",
            linear=LinearPlan(binary=BinarySpec(3), solver=SolverSpec(name="nearest", levels="greedy")),
            tables=TablePlan(binary=BinarySpec(4, words=_CLUSTERS)),
            rules=(
                _POSITIONS,
                Rule("part:embedding", binary=BinarySpec(4, words=_CLUSTERS)),
                Rule("part:decoder.attention", binary=BinarySpec(2)),
                Rule("part:decoder.cross", binary=BinarySpec(3)),
                Rule("part:decoder.ffn", binary=BinarySpec(1)),
                Rule("part:encoder.attention", binary=BinarySpec(3)),
                Rule("part:encoder.ffn", binary=BinarySpec(4)),
            ),
        ),
        Recipe(
            "auto",
            "The best of all formats for each weight, to --size or --bits (4 where neither is given).",
            linear=LinearPlan(),
            alternatives=(
                LinearPlan(grid=GridSpec(2, "column", window=4), frame=FrameSpec()),
                LinearPlan(grid=GridSpec(3, "column"), mixed=MixedSpec()),
                LinearPlan(float8=Float8Spec()),
            ),
        ),
    )
}
