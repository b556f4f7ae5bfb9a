"""The Viterbi algorithm on the trellis of the codebook format: the codes of least total cost along runs of outputs.

A run is what follows itself through the tiles of 32 outputs: n, n + 32, n + 64, ... An index holds the current code in
its lowest bits and the codes before it above; a state is an index without its oldest code's bits.
"""

from __future__ import annotations

import numpy as np

# Up to so many states every start is tried; beyond, the start is found on the run turned by half.
_EXACT_STATES = 4
# Shorter runs have not forgotten their start by half-way: 12 steps of 2 bits, window 6, would cost a fifth more.
_EXACT_STEPS = 24


def closed_path(costs: np.ndarray, bits: int, window: int) -> np.ndarray:
    """Indices of the best path that ends in the state it began with.

    Exact up to 4 states or 24 steps. Beyond, the state between end and start is the one that the best open path has
    there when the run begins half-way, as in QTIP: up to a tenth of the cost is lost at 25 steps, a hundredth at 64.

    Args:
        costs: float32 [steps, runs, 2**window], of taking an index at a step.
        bits: of a code.
        window: of an index.

    Returns:
        int64 [steps, runs].
    """
    steps, runs, _ = costs.shape
    states = 1 << (window - bits)
    if states == 1:
        cheapest: np.ndarray = costs.argmin(axis=2)
        return cheapest
    if states <= _EXACT_STATES or steps <= _EXACT_STEPS:
        starts = np.tile(np.arange(states), runs)
        paths, totals = _path(costs, bits, window, starts)
        best = totals.reshape(runs, states).argmin(axis=1) + states * np.arange(runs)
        return paths[:, best]
    half = steps // 2
    turned, _ = _path(np.roll(costs, half, axis=0), bits, window, None)
    return _path(costs, bits, window, turned[half] >> bits)[0]


def open_path(costs: np.ndarray, bits: int, window: int) -> np.ndarray:
    """Indices of the best path with any start and end; see `closed_path`."""
    return _path(costs, bits, window, None)[0]


def _path(costs: np.ndarray, bits: int, window: int, ends: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Best indices int64 [steps, runs] and their cost [runs]; from the states `ends` back to them if given.

    Several `ends` for each run, one after the other, make as many paths of it.
    """
    steps, runs, indices = costs.shape
    states = 1 << (window - bits)
    copies = 1 if ends is None else len(ends) // runs
    runs *= copies
    rows = np.arange(runs)
    if ends is None:
        total = np.zeros((runs, states), np.float32)
    else:
        total = np.full((runs, states), np.float32(1e30))
        total[rows, ends] = 0
    chosen = np.empty((steps, runs, states), np.uint8)
    for step in range(steps):
        # Indices arriving at a state differ in their highest bits alone.
        arriving = np.repeat(total, indices // states, axis=1)
        arriving += costs[step] if copies == 1 else np.repeat(costs[step], copies, axis=0)
        arriving = arriving.reshape(runs, -1, states)
        best = arriving.argmin(axis=1)
        chosen[step] = best
        total = np.take_along_axis(arriving, best[:, None], axis=1)[:, 0]
    state = total.argmin(axis=1) if ends is None else ends
    reached = total[rows, state]
    path = np.empty((steps, runs), np.int64)
    for step in range(steps - 1, -1, -1):
        path[step] = chosen[step, rows, state].astype(np.int64) * states + state
        state = path[step] >> bits
    return path, reached
