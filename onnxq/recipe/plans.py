"""What recipes do to weights: products', tables', and exceptions by name."""

from __future__ import annotations

import dataclasses
from typing import Literal

from onnxq.recipe.checks import require, require_choices
from onnxq.recipe.storage import BinarySpec, Float8Spec, FrameSpec, GridSpec, MixedSpec


@dataclasses.dataclass(frozen=True)
class SolverSpec:
    """What chooses the codes.

    Attributes:
        name: "error-feedback" (GPTQ/LDLQ; needs calibration data) or "nearest".
        levels: "search" for the steps of least error, or published rules: "min-max" (GPTQ) levels span a row's range,
            "two-sigma" (FrameQuant) ones two of its standard deviations, and what lies outside is clipped. Rules need
            a grid of one group a column with per-group-integer zero points. "greedy" (binary codes, nearest) fits one
            plane after the other.
        damping: share of the mean diagonal that is added to the second moment's diagonal.
        order: in which order inputs are rounded, "activation" or "natural".
        refit: fit steps to the codes afterwards, under the whole second moment.
        sweeps: passes of coordinate descent over the codes that follow.
    """

    name: Literal["error-feedback", "nearest"] = "error-feedback"
    levels: Literal["search", "min-max", "two-sigma", "greedy"] = "search"
    damping: float = 0.01
    order: Literal["activation", "natural"] = "activation"
    refit: bool = True
    sweeps: int = 0

    def __post_init__(self) -> None:
        require_choices(self)
        require(self.damping > 0, f"damping is {self.damping}; it must be above 0, such as 0.01")
        require(self.sweeps >= 0, f"sweeps is {self.sweeps}; it must be 0 or more")


@dataclasses.dataclass(frozen=True)
class ActivationSpec:
    """How the inputs of products are rounded, on top of what is done to weights.

    Attributes:
        kind: float8, or "int8"; "auto" takes for each tensor the one of e4m3fn and int8 that moves the products less.
        scale: "static": one for the tensor, found by calibration; "token": one for each token as it comes (float8);
            "dynamic": one for the tensor as it comes (int8 with target "stock").
        clip: what a static scale reaches to: the largest magnitude seen ("amax"), a percentile of magnitudes, where the
            squared error is least ("mse"), or where the distribution changes least ("entropy", int8).
        percentile: of that clip.
        powers_of_two: scales are powers of two.
        attention: round both sides of attention's products of activations too.
    """

    kind: Literal["e4m3fn", "e5m2", "int8", "auto"] = "e4m3fn"
    scale: Literal["static", "token", "dynamic"] = "static"
    clip: Literal["amax", "percentile", "mse", "entropy"] = "amax"
    percentile: float = 99.99
    powers_of_two: bool = False
    attention: bool = False

    def __post_init__(self) -> None:
        require_choices(self)
        require(50 < self.percentile <= 100, f"percentile is {self.percentile}; it must be above 50 and at most 100")
        require(self.clip != "entropy" or self.kind == "int8", 'clip "entropy" is for kind "int8"')
        fits = {"static": True, "token": self.kind in ("e4m3fn", "e5m2"), "dynamic": self.kind == "int8"}
        require(fits[self.scale], f"scale {self.scale!r} does not go with kind {self.kind!r}")
        require(not self.attention or self.scale != "dynamic", 'attention does not go with scale "dynamic"')


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
        float8: floating-point codes in place of the grid; null for none.
        binary: planes of signs in place of the grid; null for none.
        inputs: how activations are rounded in front of the products, which then take them as they are: `activations`
            no longer counts. Null leaves them alone.
        min_snr: leave a weight in float where its products would come out below this signal-to-noise ratio, in dB, on
            a sample of the calibration data; null asks nothing.
    """

    grid: GridSpec = GridSpec()
    frame: FrameSpec | None = None
    solver: SolverSpec = SolverSpec()
    activations: Literal["int8", "float32"] = "int8"
    mixed: MixedSpec | None = None
    float8: Float8Spec | None = None
    binary: BinarySpec | None = None
    inputs: ActivationSpec | None = None
    min_snr: float | None = None

    def __post_init__(self) -> None:
        require_choices(self)
        self.require_levels(self.grid, "grid")
        domains = [name for name in ("frame", "mixed", "float8", "binary") if getattr(self, name) is not None]
        require(len(domains) < 2, f"a plan has one of frame, mixed, float8 and binary, not {' and '.join(domains)}")
        greedy = self.solver.levels == "greedy"
        require(
            not greedy or (self.binary is not None and self.solver.name == "nearest"),
            'levels "greedy" are of binary codes, rounded to nearest',
        )
        searched = self.solver.levels == "search"
        require(
            self.mixed is None or searched, f'levels {self.solver.levels!r} are of one depth; mixed ones need "search"'
        )

    def require_levels(self, grid: GridSpec, where: str) -> None:
        """Refuse a grid that the solver's rule of levels does not fit."""
        fits = grid.group_size == "column" and grid.zero_point == "per-group-integer" and grid.window is None
        require(
            fits or self.solver.levels in ("search", "greedy"),
            f"{where}: levels {self.solver.levels!r} need a grid of "
            'group_size "column" and zero_point "per-group-integer"',
        )


@dataclasses.dataclass(frozen=True)
class TablePlan:
    """What happens to weights that only look-ups read.

    Attributes:
        grid: how their rows are stored; null leaves tables alone.
        float8: floating-point codes in place of the grid; null for none.
        binary: planes of signs in place of the grid; null for none.
    """

    grid: GridSpec | None = GridSpec(bits=4, group_size=64)
    float8: Float8Spec | None = None
    binary: BinarySpec | None = None

    def __post_init__(self) -> None:
        require(self.float8 is None or self.binary is None, "tables have float8 or binary codes, not both")


@dataclasses.dataclass(frozen=True)
class Rule:
    """An exception by name; the first rule that matches decides.

    Attributes:
        match: a glob over weight names, site names, such as "*.layer.0.*", and parts, such as "part:decoder.*"
            (`onnxq.graph.parts`).
        keep: leave the weight in float.
        grid: another grid.
        binary: planes of signs.
    """

    match: str
    keep: bool = False
    grid: GridSpec | None = None
    binary: BinarySpec | None = None

    def __post_init__(self) -> None:
        said = [self.keep, self.grid is not None, self.binary is not None]
        require(sum(said) == 1, f"the rule for {self.match!r} must say one of keep, grid and binary")
