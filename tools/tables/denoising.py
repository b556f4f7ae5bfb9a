"""What closed-form denoising of the frame's reconstruction is worth: a gain per subspace, best under the proxy loss.

    python -m tools.tables.denoising

For some weights of MiniLM at 2 bits: the relative proxy loss as rounded, with steps fitted to the codes, with sweeps of
coordinate descent, and with the trellis code; beside each, what the best gain for every subspace would make of it.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from onnxq.formats.codebook import CodebookFormat
from onnxq.formats.uniform import UniformFormat
from onnxq.frames import Frame, frame_shape, make_frame
from onnxq.solvers.error_feedback import error_feedback
from onnxq.solvers.factor import Order, factorise
from onnxq.solvers.grid import search_grid
from onnxq.solvers.loss import relative_proxy_loss
from onnxq.solvers.spread import best_spread, widened
from onnxq.solvers.trellis import trellis_feedback
from tools.tables.framequant import Bench

REDUNDANCIES = (Fraction(9, 8), Fraction(5, 4))
WEIGHTS = ("layer.3.output.dense.weight", "layer.4.attention.output.dense.weight")


def denoised(rounded: np.ndarray, coefficients: np.ndarray, moment: np.ndarray, frame: Frame) -> np.ndarray:
    """Rounded coefficients [N, K'] with the gain per subspace that minimises the proxy loss of all rows together."""
    width = frame.shape.block_outputs
    subspace = (np.arange(rounded.shape[1]) % width) // 2
    count = width // 2
    images = [np.where(subspace == s, rounded, 0) @ moment for s in range(count)]
    normal = np.array(
        [[(images[s] * np.where(subspace == t, rounded, 0)).sum() for t in range(count)] for s in range(count)]
    )
    wanted = np.array([(images[s] * coefficients).sum() for s in range(count)])
    gains: np.ndarray = rounded * np.linalg.solve(normal, wanted)[subspace]
    return gains


def main() -> None:
    bench = Bench("minilm")
    for weight in bench.weights:
        if not weight.name.endswith(WEIGHTS):
            continue
        matrix, second_moment = weight.matrix(), bench.statistics(weight).second_moment
        assert second_moment is not None
        for redundancy in REDUNDANCIES:
            frame = make_frame(frame_shape(weight.k, redundancy))
            coefficients = frame.analysis(matrix)
            moment = frame.carry(second_moment)
            factor = factorise(moment, len(moment), 0.01, Order.ACTIVATION)
            format = UniformFormat(2, None)
            spread = best_spread(coefficients, format, factor)
            grid = widened(search_grid(coefficients, format, factor.importance()), spread)
            trellis = CodebookFormat(2, 4)
            ways = {
                "as rounded": error_feedback(coefficients, format, factor, grid=grid, refit=False),
                "steps fitted": error_feedback(coefficients, format, factor, grid=grid),
                "one sweep": error_feedback(coefficients, format, factor, grid=grid, sweeps=1),
                "three sweeps": error_feedback(coefficients, format, factor, grid=grid, sweeps=3),
                "trellis": trellis_feedback(
                    coefficients, trellis, factor, spread=best_spread(coefficients, trellis, factor)
                ),
            }
            for name, encoding in ways.items():
                rounded = encoding.dequantize()
                before = relative_proxy_loss(matrix, frame.synthesis(rounded), second_moment)
                better = denoised(rounded, coefficients, moment, frame).astype(np.float32)
                after = relative_proxy_loss(matrix, frame.synthesis(better), second_moment)
                print(
                    f"{weight.name} redundancy {frame.shape.redundancy:.3f} {name}: {before:.5f}, denoised {after:.5f}"
                )


if __name__ == "__main__":
    main()
