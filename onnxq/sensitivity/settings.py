"""What is probed, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class SensitivitySettings:
    """How to estimate. The defaults are for an allocation over whole weights; `paper` is CVXQ's estimate.

    Attributes:
        kind: "output" looks at squared changes of the outputs, "fisher" at the divergence of the distribution that
            ``logits`` stand for; "auto" is "fisher" where the model has such an output.
        directions: of "output": "random" signs over all coordinates of a row (no direction is left out), or "pca",
            the leading eigenvectors of the outputs' covariance, one per sample in turn.
        components: how many eigenvectors at most.
        tokens: rows per sample, on an even grid over those that count, the first and the last among them; None: all.
        passes: backward passes per run. The rows of a sample are dealt out to them; those that share a pass get
            random signs, which leaves the mean of the estimate as it is and raises its variance.
        samples: at most so many of the data's samples, evenly spread over its batches; None: all.
        tokens_at_once: batches are split by samples until their token inputs hold no more; what a run holds in
            memory grows with it.
        first: how many samples went before, where a measurement goes on from others: with "pca" it says which
            eigenvector's turn it is.
        outputs: see `onnxq.calibration.output_rows.OutputRows`.
        seed: of everything drawn.
        device: of torch, such as "cuda".
        threads: of torch; None leaves them as they are.
    """

    kind: Literal["auto", "output", "fisher"] = "auto"
    directions: Literal["random", "pca"] = "random"
    components: int = 256
    tokens: int | None = 17
    passes: int = 2
    samples: int | None = None
    tokens_at_once: int = 1024
    first: int = 0
    outputs: tuple[str, ...] | None = None
    seed: int = 0
    device: str = "cpu"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name in ("components", "tokens", "passes", "samples", "tokens_at_once"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")

    @classmethod
    def paper(cls, *, samples: int | None = None, components: int = 1024, seed: int = 0) -> SensitivitySettings:
        """CVXQ's: one sample a run, one pass for each of 17 tokens, one principal component a sample."""
        return cls("output", "pca", components, 17, 17, samples, tokens_at_once=1, seed=seed)
