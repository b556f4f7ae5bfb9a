"""What changed weights do to the results of a loop over several graphs: a recorded trace is played again with them.

The measure is the Kullback-Leibler divergence of the distributions that ``logits`` stand for, mean over all tokens, in
nats; of graphs without logits, the squared error of all outputs that nothing takes, over their squares. It goes through
every graph: what the encoder's error does is seen in the decoder's logits, with the tokens of the first time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort

from onnxq.calibration.trace import Feed, Run, Trace
from onnxq.errors import CalibrationError

LOGITS = "logits"


@dataclasses.dataclass(frozen=True)
class _Result:
    """What a call of the float models came to: log-probabilities [T, V], or outputs by name."""

    log_p: np.ndarray | None
    outputs: Mapping[str, np.ndarray]


class Replay:
    """A trace with the results of the float models.

    Memory: the logits of every recorded token in float32, and one session for each graph.

    Args:
        trace: what to play; a few samples suffice (`Trace.head`).
        models: the float model of each graph, by file name.
        threads: of the sessions; None leaves it to ONNX Runtime.

    Raises:
        CalibrationError: a graph of the trace has no model, or a call no result to compare.
    """

    def __init__(self, trace: Trace, models: Mapping[str, Path], threads: int | None = None) -> None:
        missing = [graph for graph in trace.graphs if graph not in models]
        if missing:
            raise CalibrationError(
                f"The trace {trace.folder} ran {', '.join(missing)}, and there {'is' if len(missing) == 1 else 'are'} "
                f"only {', '.join(sorted(models))}: record it with the graphs of this folder."
            )
        self.trace, self._models, self._threads = trace, models, threads
        self._values: dict[str, dict[str, ort.OrtValue]] = {}
        self._sessions = {graph: self._session(graph, {}) for graph in trace.graphs}
        taken = {(link.call, link.output) for call in trace.calls for link in call.links.values()}
        self._results = [
            self._result(number, outputs, taken) for number, (_, outputs) in enumerate(trace.play(self._runs({})))
        ]
        if not any(result.log_p is not None or result.outputs for result in self._results):
            raise CalibrationError(f"The trace {trace.folder} has no result: every output is what a later run takes.")

    @property
    def kind(self) -> str:
        """What `divergence` is: "kl", in nats, or "relative", a squared error over squares."""
        return "kl" if any(result.log_p is not None for result in self._results) else "relative"

    def divergence(self, weights: Mapping[str, Mapping[str, np.ndarray]]) -> float:
        """Of the models with some initializers replaced from the float ones.

        Args:
            weights: by graph and initializer name, arrays of its type and shape.
        """
        changed = {graph: self._session(graph, arrays) for graph, arrays in weights.items() if arrays}
        total = count = 0.0
        played = self.trace.play(self._runs(changed))
        for (_, outputs), result in zip(played, self._results, strict=True):
            if result.log_p is not None:
                log_q = _log_softmax(outputs[LOGITS])
                total += float((np.exp(result.log_p) * (result.log_p - log_q)).sum())
                count += len(log_q)
            elif self.kind == "relative":
                for name, output in result.outputs.items():
                    total += float(np.square(outputs[name] - output, dtype=np.float64).sum())
                    count += float(np.square(output, dtype=np.float64).sum())
        return total / count if count else 0.0

    def _result(self, number: int, outputs: Mapping[str, np.ndarray], taken: set[tuple[int, str]]) -> _Result:
        if LOGITS in outputs:
            return _Result(_log_softmax(outputs[LOGITS]), {})
        last = {
            name: output for name, output in outputs.items() if output.dtype.kind == "f" and (number, name) not in taken
        }
        return _Result(None, last)

    def _runs(self, changed: Mapping[str, ort.InferenceSession]) -> dict[str, Run]:
        def run_of(graph: str) -> Run:
            session = changed.get(graph, self._sessions[graph])
            names = [output.name for output in session.get_outputs()]

            def run(feed: Feed) -> dict[str, np.ndarray]:
                return dict(zip(names, session.run(names, dict(feed)), strict=True))

            return run

        return {graph: run_of(graph) for graph in self._sessions}

    def _session(self, graph: str, weights: Mapping[str, np.ndarray]) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # ONNX Runtime reads them where they are: they have to outlive the session.
        values = {name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(a)) for name, a in weights.items()}
        for name, value in values.items():
            options.add_initializer(name, value)
        self._values[graph] = values
        return ort.InferenceSession(str(self._models[graph]), options, providers=["CPUExecutionProvider"])


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logits [..., V] to log-probabilities float32 [T, V]."""
    rows = logits.reshape(-1, logits.shape[-1]).astype(np.float32)
    rows = rows - rows.max(-1, keepdims=True)
    probabilities: np.ndarray = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    return probabilities
