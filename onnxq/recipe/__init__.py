"""Recipes: a typed, frozen description of a run, from a preset or a YAML file, stored in the model it made.

Unknown keys are refused with the nearest valid name; values out of range with what is allowed.
"""

from onnxq.recipe.plans import ActivationSpec, LinearPlan, Rule, SolverSpec, TablePlan
from onnxq.recipe.recipe import Recipe, presets, uniform_recipe
from onnxq.recipe.settings import AllocationSpec, CalibrationSpec, DistillationSpec
from onnxq.recipe.storage import BinarySpec, Float8Spec, FrameSpec, GridSpec, GroupSize, MixedSpec, WordSpec

__all__ = [
    "ActivationSpec",
    "AllocationSpec",
    "BinarySpec",
    "CalibrationSpec",
    "DistillationSpec",
    "Float8Spec",
    "FrameSpec",
    "GridSpec",
    "GroupSize",
    "LinearPlan",
    "MixedSpec",
    "Recipe",
    "Rule",
    "SolverSpec",
    "TablePlan",
    "WordSpec",
    "presets",
    "uniform_recipe",
]
