from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from onnxq.errors import RecipeError
from onnxq.formats.codebook import CodebookFormat
from onnxq.formats.framed import FramedFormat
from onnxq.formats.uniform import UniformFormat, ZeroPoint
from onnxq.recipe import (
    ActivationSpec,
    AllocationSpec,
    BinarySpec,
    CalibrationSpec,
    DistillationSpec,
    Float8Spec,
    FrameSpec,
    GridSpec,
    LinearPlan,
    MixedSpec,
    Recipe,
    Rule,
    SolverSpec,
    TablePlan,
    WordSpec,
    presets,
    uniform_recipe,
)

FULL = Recipe(
    "everything",
    "Every field somewhere not at its default.",
    linear=LinearPlan(
        GridSpec(3, "column", "per-group-integer"),
        FrameSpec(1.25, 1.5),
        SolverSpec("nearest", "min-max", 0.1, "natural", False, 2),
        "float32",
    ),
    tables=TablePlan(None),
    rules=(Rule("*.0.*", keep=True), Rule("head", grid=GridSpec(8, 32, "per-group-integer", 6))),
    min_elements=7,
    calibration=CalibrationSpec(3, 2, 1, True),
    allocation=AllocationSpec("layer", 3, 0.5),
    distillation=DistillationSpec(3, 0.5),
    target="stock",
    seed=5,
)

MIXED = Recipe(
    "mixed",
    "What stock ONNX Runtime, which the other is for, has not.",
    linear=LinearPlan(mixed=MixedSpec(64)),
    alternatives=(LinearPlan(GridSpec(2)),),
)
ROUNDED = Recipe(
    "rounded",
    "Codes of other kinds, and rounded inputs.",
    linear=LinearPlan(
        float8=Float8Spec("e5m2", 32, powers_of_two=True, or_grid=True),
        inputs=ActivationSpec("int8", "static", "percentile", 99.0, powers_of_two=True, attention=True),
        min_snr=20.0,
    ),
    tables=TablePlan(float8=Float8Spec()),
)
BINARY = Recipe(
    "signs",
    "Planes of signs, and inputs by token.",
    linear=LinearPlan(binary=BinarySpec(2, 64, True), inputs=ActivationSpec(scale="token")),
    tables=TablePlan(binary=BinarySpec(words=WordSpec(mean_planes=3, every_row=0))),
    rules=(Rule("head", binary=BinarySpec(4, words=WordSpec("frequency", 5, 2.0))),),
)


@pytest.mark.parametrize("recipe", [FULL, MIXED, ROUNDED, BINARY, *presets().values()], ids=lambda recipe: recipe.name)
def test_yaml_brings_back_the_same_recipe(recipe: Recipe, tmp_path: Path) -> None:
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    path = tmp_path / "recipe.yaml"
    path.write_text(recipe.to_yaml())
    assert Recipe.load(path) == recipe


def test_every_field_of_the_full_recipes_is_somewhere_not_at_its_default() -> None:
    """Keeps the round trip above honest when a field is added."""
    missing = {}

    def look(value: Any) -> None:
        if isinstance(value, tuple):
            for item in value:
                look(item)
        if not dataclasses.is_dataclass(value):
            return
        for field in dataclasses.fields(value):
            key = f"{type(value).__name__}.{field.name}"
            differs = getattr(value, field.name) != field.default
            missing[key] = missing.get(key, True) and not differs
            look(getattr(value, field.name))

    for recipe in (FULL, MIXED, ROUNDED, BINARY):
        look(recipe)
    assert [key for key, never in missing.items() if never] == []
    assert "GridSpec.window" in missing
    assert "FrameSpec.output_redundancy" in missing
    assert "DistillationSpec.rate" in missing


def test_what_is_left_out_has_its_default() -> None:
    recipe = Recipe.from_yaml("name: short\nlinear: {grid: {bits: 3}}")
    assert recipe == Recipe("short", linear=LinearPlan(GridSpec(3)))


def test_a_whole_number_is_a_number() -> None:
    recipe = Recipe.from_yaml("name: x\nlinear: {solver: {damping: 1}}")
    assert isinstance(recipe.linear.solver.damping, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "linear: {grid: {bit: 3}}",
            r"recipe\.linear\.grid has no key 'bit'. Did you mean 'bits'\? Valid keys: bits, ",
        ),
        ("lineer: {}", r"recipe has no key 'lineer'. Did you mean 'linear'\?"),
        (
            "rules: [{match: a, keep: true}, {match: b, gird: {}}]",
            r"recipe\.rules\[1\] has no key 'gird'.*'grid'\?",
        ),
        ("linear: {grid: {bits: 9}}", "bits is 9; it must be 1 to 8"),
        ("linear: {grid: {bits: 0}}", "bits is 0; it must be 1 to 8"),
        ("linear: {grid: {bits: '4'}}", r"grid\.bits must be a whole number, not '4'"),
        ("linear: {grid: {bits: true}}", r"grid\.bits must be a whole number, not True"),
        ("linear: {grid: {group_size: 33}}", 'group_size is 33; it must be a multiple of 32, "column" or "weight"'),
        (
            "linear: {grid: {group_size: colum}}",
            r"group_size is 'colum'; it must be a whole number or 'column' or 'weight'",
        ),
        ("linear: {grid: {zero_point: mid-rise}}", r"zero_point is 'mid-rise'.*Did you mean 'midrise'\?"),
        ("linear: {solver: {name: gptq}}", "name is 'gptq'; it must be one of error-feedback, nearest"),
        ("linear: {solver: {damping: 0}}", r"recipe\.linear\.solver: damping is 0\.0; it must be above 0"),
        ("linear: {solver: {sweeps: -1}}", "sweeps is -1; it must be 0 or more"),
        ("linear: {solver: {refit: 1}}", "refit must be true or false, not 1"),
        ("linear: {activations: int4}", r"'int4'.*Did you mean 'int8'\?"),
        ("linear: {frame: {redundancy: 0.9}}", r"redundancy is 0\.9; it must be 1 to 8, such as 1\.125"),
        ("linear: {frame: {output_redundancy: 9}}", r"output_redundancy is 9\.0; it must be 1 to 8"),
        ("linear: {frame: {redundancey: 1}}", r"linear\.frame has no key 'redundancey'. Did you mean 'redundancy'\?"),
        ("linear: {grid: {window: 7}}", "window is 7; it must be one of 2, 3, 4, 5, 6, or null"),
        ("linear: {mixed: {band: 8}}", "band is 8; it must be 32 or more"),
        ("linear: {mixed: {}, frame: {}}", "a plan has one of frame, mixed, float8 and binary, not frame and mixed"),
        ("linear: {mixed: {}}\ntarget: stock", 'target is "stock", which has no mixed depths'),
        ("linear: {solver: {levels: minmax}}", r"levels is 'minmax'.*Did you mean 'min-max'\?"),
        ("linear: {solver: {levels: two-sigma}}", "levels 'two-sigma' need a grid of group_size \"column\""),
        ("distillation: {steps: 0}", "steps is 0; it must be 1 or more"),
        ("tables: {binary: {words: {clusters: 7}}}", "clusters is 7; it must be 1 to 6"),
        ("tables: {binary: {words: {ratio: 0}}}", r"ratio is 0\.0; it must be above 0, such as 1 or 4"),
        ("tables: {binary: {words: {ratio: .nan}}}", "ratio is nan; it must be above 0"),
        ("tables: {binary: {words: {mean_planes: 0.5}}}", r"mean_planes is 0\.5; it must be 1 to 6, such as 2\.5"),
        ("tables: {binary: {words: {every_row: -1}}}", r"every_row is -1\.0; it must be 0 or more"),
        ("tables: {binary: {words: {by: rank}}}", "by is 'rank'; it must be one of frequency, loss"),
        (
            "tables: {binary: {words: {clusters: 3}}}",
            r'words: clusters has no meaning with by "loss", which takes mean_planes and every_row',
        ),
        (
            "tables: {binary: {words: {by: frequency, mean_planes: 3}}}",
            r'words: mean_planes has no meaning with by "frequency", which takes clusters and ratio',
        ),
        ("linear: 4", "recipe.linear must be a mapping of keys, not 4"),
        ("rules: {match: a}", "rules must be a list"),
        ("rules: [{match: a}]", r"recipe\.rules\[0\]: the rule for 'a' must say one of keep, grid and binary"),
        ("rules: [{match: a, keep: true, grid: {bits: 2}}]", "one of keep, grid and binary"),
        ("rules: [{keep: true}]", r"recipe\.rules\[0\] lacks match"),
        ("calibration: {batch_size: 0}", "batch_size is 0; it must be at least 1"),
        ("min_elements: -1", "min_elements is -1; it must be 0 or more"),
        ("target: stok", r"target is 'stok'; it must be one of kernel, stock. Did you mean 'stock'\?"),
        ("seed: 1.5", "seed must be a whole number, not 1.5"),
    ],
)
def test_a_slip_is_refused_with_its_place_and_its_cure(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(f"name: x\n{text}")


@pytest.mark.parametrize(
    ("text", "message"),
    [("- 1", "a mapping"), ("", "a mapping"), ("name: [", "not YAML"), ("seed: 1", "lacks name")],
)
def test_what_is_no_recipe_is_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.from_yaml(text)


def test_python_is_checked_like_yaml() -> None:
    """A misspelt solver must not pass for the other one."""
    misspelt: Any = "error-feedbak"
    with pytest.raises(RecipeError, match=r"Did you mean 'error-feedback'\?"):
        SolverSpec(misspelt)
    with pytest.raises(RecipeError, match="target is 'error-feedbak'"):
        Recipe("x", target=misspelt)
    with pytest.raises(RecipeError, match="activations is"):
        LinearPlan(activations=misspelt)
    with pytest.raises(RecipeError, match="zero_point is"):
        GridSpec(zero_point=misspelt)
    with pytest.raises(RecipeError, match="group_size is error-feedbak"):
        GridSpec(group_size=misspelt)


@pytest.mark.parametrize("fractional", ["midrise", "per-group"])
@pytest.mark.parametrize("place", ["linear: {grid: %s}", "tables: {grid: %s}", "rules: [{match: a, grid: %s}]"])
def test_stock_takes_whole_zero_points_only(place: str, fractional: str) -> None:
    text = place % f"{{zero_point: {fractional}}}"
    Recipe.from_yaml(f"name: x\n{text}")
    with pytest.raises(RecipeError, match=rf'grid\.zero_point is {fractional}; with target "stock".*"auto"'):
        Recipe.from_yaml(f"name: x\ntarget: stock\n{text}")
    whole = place % "{zero_point: integer}"
    Recipe.from_yaml(f"name: x\ntarget: stock\n{whole}")


def test_auto_zero_points_depend_on_width_and_target() -> None:
    kinds = {bits: GridSpec(bits).formats("kernel")[0].zero_point for bits in range(1, 9)}
    assert kinds == {bits: ZeroPoint.MIDRISE if bits <= 2 else ZeroPoint.PER_GROUP for bits in range(1, 9)}
    assert all(GridSpec(bits).formats("stock")[0].zero_point.whole for bits in (2, 4, 8))
    (midrise,) = GridSpec(4, zero_point="midrise").formats("kernel")
    assert midrise.zero_point is ZeroPoint.MIDRISE
    assert [format.zero_point for format in GridSpec(2).formats("kernel")] == [ZeroPoint.MIDRISE, ZeroPoint.INTEGER]


def test_a_window_means_levels_from_a_table_where_there_is_one() -> None:
    trellis, equal = GridSpec(2, "column", window=4).formats("kernel")
    assert trellis == CodebookFormat(2, 4)
    assert equal == UniformFormat(2, None, ZeroPoint.MIDRISE)
    for grid, target, tables in (
        (GridSpec(2, "column", window=4), "stock", True),
        (GridSpec(2, "column", window=4), "kernel", False),
        (GridSpec(5, "column", window=6), "kernel", True),
    ):
        formats = grid.formats(target, tables=tables)
        assert all(isinstance(format, UniformFormat) for format in formats), (grid, target, tables)


@pytest.mark.parametrize(("redundancy", "exact"), [(1.1, Fraction(11, 10)), (1.125, Fraction(9, 8)), (1, Fraction(1))])
def test_a_redundancy_is_the_fraction_that_was_meant(redundancy: float, exact: Fraction) -> None:
    framed = FrameSpec(redundancy, redundancy).around(UniformFormat(2), seed=4)
    assert framed == FramedFormat(UniformFormat(2), exact, exact, 4)


def test_a_column_is_no_group_size() -> None:
    assert GridSpec(4, "column").formats("kernel")[0].group_size is None
    assert GridSpec(4, 96).formats("kernel")[0].group_size == 96


def test_the_first_matching_rule_decides() -> None:
    first, second = Rule("*.1.*", keep=True), Rule("*", grid=GridSpec(8))
    recipe = Recipe("x", rules=(first, second))
    assert recipe.rule_for(["layer.1.weight"]) is first
    assert recipe.rule_for(["layer.2.weight", "block.1.MatMul"]) is first
    assert recipe.rule_for(["layer.2.weight"]) is second
    assert Recipe("x", rules=(first,)).rule_for(["layer.2.weight"]) is None


def test_digest_tells_what_differs_and_nothing_else() -> None:
    base = presets()["uniform"]
    assert dataclasses.replace(base, name="other", description="other").digest() == base.digest()
    assert dataclasses.replace(base, seed=1).digest() != base.digest()
    assert uniform_recipe(3).digest() != base.digest()
    assert uniform_recipe().linear == base.linear
    assert len({recipe.digest() for recipe in presets().values()}) == len(presets())
    assert base.digest() == Recipe.from_yaml(base.to_yaml()).digest()


def test_presets_are_found_by_name() -> None:
    for name, recipe in presets().items():
        assert Recipe.load(name) is recipe
        assert recipe.name == name
        assert recipe.description
    with pytest.raises(RecipeError, match=r"'unifrom' is neither a preset nor a file. Did you mean 'uniform'\?"):
        Recipe.load("unifrom")


def test_uniform_recipe_sets_widths() -> None:
    recipe = uniform_recipe(2, 128)
    assert (recipe.linear.grid.bits, recipe.linear.grid.group_size) == (2, 128)
    assert recipe.tables.grid == GridSpec(4, 128)
    assert uniform_recipe(6).tables.grid == GridSpec(6, 64)
    assert uniform_recipe(6, table_bits=3, target="stock").tables.grid == GridSpec(3, 64)


def test_levels_by_rule_need_a_grid_that_they_fit() -> None:
    with pytest.raises(RecipeError, match="levels 'two-sigma' need a grid of group_size"):
        LinearPlan(GridSpec(2, 64), solver=SolverSpec(levels="two-sigma"))
