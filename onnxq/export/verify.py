"""Compare exported graphs with the torch model on random inputs.

The reference is the plain model called as its users call it, not the patched one that was traced. Sizes
differ from those of tracing, so that a size baked into the graph shows. Graphs with a cache are run in two
steps (a prompt, then more tokens on the returned cache) and compared with one torch pass over all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from onnxq.errors import ExportError
from onnxq.export.finish import Finished
from onnxq.export.result import ExportedGraph, OutputDifference

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SIZES = ((1, 5), (3, 11))
"""(batch, tokens) of the inputs tried; tracing uses (2, 16)."""

PROMPT = 3
"""Tokens of the first of two steps with a cache."""

Feeds = dict[str, np.ndarray]


@dataclass
class Comparison:
    """Differences collected over several runs of one graph, or the reason why there are none."""

    max_abs: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    unverified: str = ""

    def add(self, name: str, reference: np.ndarray, candidate: np.ndarray) -> None:
        """Take one output of one run into account.

        Raises:
            ExportError: Shapes differ, or only one of the two is finite.
        """
        if reference.shape != candidate.shape:
            raise ExportError(
                f"output {name} has shape {candidate.shape}, torch gives {reference.shape}: the export baked in a size"
            )
        if not np.array_equal(np.isfinite(reference), np.isfinite(candidate)):
            raise ExportError(f"output {name} is not finite where torch's is, or the other way round")
        finite = np.isfinite(reference)
        gap = np.abs(reference[finite].astype(np.float64) - candidate[finite].astype(np.float64))
        self.max_abs[name] = max(self.max_abs.get(name, 0.0), float(gap.max(initial=0.0)))
        self.largest[name] = max(self.largest.get(name, 0.0), float(np.abs(reference[finite]).max(initial=0.0)))

    def differences(self) -> tuple[OutputDifference, ...]:
        """What was collected, by output."""
        return tuple(
            OutputDifference(
                name,
                gap,
                gap / self.largest[name] if self.largest[name] else 0.0 if gap == 0 else float("inf"),
            )
            for name, gap in self.max_abs.items()
        )


def checked(path: Path, facts: Finished, comparison: Comparison | None, tolerance: float | None) -> ExportedGraph:
    """The report of one graph.

    Raises:
        ExportError: An output is further from torch's than `tolerance`.
    """
    differences = comparison.differences() if comparison else ()
    for difference in differences:
        if tolerance is not None and not difference.relative <= tolerance:
            raise ExportError(
                f"{path.name}: output {difference.name} differs from torch by {difference.max_abs:.3g} "
                f"({difference.relative:.3g} of its largest value, {tolerance:g} allowed): "
                "try another opset, or export the module itself"
            )
    reason = "" if differences else (comparison.unverified if comparison else "verification was turned off")
    return ExportedGraph(
        path, facts.opset, facts.nodes, facts.operators, facts.bytes, facts.shared, differences, reason
    )


def compare_outputs(
    comparison: Comparison, reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray]
) -> None:
    """Add every output of `candidate` that `reference` has."""
    for name, value in candidate.items():
        if name in reference:
            comparison.add(name, reference[name], value)


def cpu_session(path: Path) -> ort.InferenceSession:
    """A plain session on the CPU that logs errors only."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def compare_folder(model: PreTrainedModel, folder: Path) -> dict[str, Comparison]:
    """Compare every graph of an exported folder with `model`, by file name.

    Graphs of unknown form say so in `unverified`.
    """
    comparisons = {}
    for path in sorted(folder.glob("*.onnx")):
        comparison = comparisons[path.name] = Comparison()
        session = cpu_session(path)
        rng = np.random.default_rng(0)
        try:
            for batch, length in SIZES:
                if model.config.is_encoder_decoder:
                    _compare_encoder_decoder(model, path.stem, session, comparison, rng, batch, length)
                elif any(i.name.startswith("past_key_values.") for i in session.get_inputs()):
                    _compare_with_cache(model, session, comparison, rng, batch, length)
                else:
                    _compare_plain(model, session, comparison, rng, batch, length)
        except _UnknownInputError as unknown:
            comparison.unverified = f"no rule to make up values for the input {unknown}"
    return comparisons


class _UnknownInputError(Exception):
    """An input that no random values can be made for."""


def _made_up(name: str, model: PreTrainedModel, rng: np.random.Generator, batch: int, length: int) -> np.ndarray:
    config = model.config
    if name in ("input_ids", "decoder_input_ids"):
        text = config.get_text_config()
        return rng.integers(0, text.vocab_size, (batch, length))
    if name in ("attention_mask", "encoder_attention_mask"):
        mask = np.ones((batch, length), np.int64)
        mask[-1, length - 2 :] = 0 if batch > 1 else 1
        return mask
    if name == "token_type_ids":
        return np.zeros((batch, length), np.int64)
    if name == "position_ids":
        return np.tile(np.arange(length), (batch, 1))
    if name == "pixel_values" and hasattr(config, "image_size"):
        side = (
            config.image_size
            if isinstance(config.image_size, (tuple, list))
            else (config.image_size, config.image_size)
        )
        return rng.standard_normal((batch, config.num_channels, *side), np.float32)
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        return rng.standard_normal((batch, config.num_mel_bins, 2 * config.max_source_positions), np.float32)
    raise _UnknownInputError(name)


def _torch_outputs(model: Any, feeds: Mapping[str, np.ndarray], **more: Any) -> dict[str, np.ndarray]:
    import torch

    with torch.inference_mode():
        result = model(**{name: torch.from_numpy(value) for name, value in feeds.items()}, return_dict=True, **more)
    return {name: value.numpy() for name, value in result.items() if isinstance(value, torch.Tensor)}


def _run(session: ort.InferenceSession, feeds: Mapping[str, np.ndarray]) -> Feeds:
    names = [output.name for output in session.get_outputs()]
    wanted = {i.name for i in session.get_inputs()}
    return dict(zip(names, session.run(names, {n: v for n, v in feeds.items() if n in wanted}), strict=True))


def _compare_plain(
    model: PreTrainedModel,
    session: ort.InferenceSession,
    comparison: Comparison,
    rng: np.random.Generator,
    batch: int,
    length: int,
) -> None:
    feeds = {i.name: _made_up(i.name, model, rng, batch, length) for i in session.get_inputs()}
    compare_outputs(comparison, _torch_outputs(model, feeds), _run(session, feeds))


def _empty_cache(session: ort.InferenceSession, batch: int) -> Feeds:
    """A cache of no tokens: [batch, heads, 0, width] for each past key and value."""
    return {
        i.name: np.zeros(
            [batch if axis == 0 else size if isinstance(size, int) else 0 for axis, size in enumerate(i.shape)],
            np.float32,
        )
        for i in session.get_inputs()
        if i.name.startswith("past_key_values.")
    }


def _as_past(outputs: Mapping[str, np.ndarray]) -> Feeds:
    return {n.replace("present", "past_key_values", 1): v for n, v in outputs.items() if n.startswith("present")}


def _compare_with_cache(
    model: PreTrainedModel,
    session: ort.InferenceSession,
    comparison: Comparison,
    rng: np.random.Generator,
    batch: int,
    length: int,
) -> None:
    ids = _made_up("input_ids", model, rng, batch, length)
    whole = {"attention_mask": np.ones((batch, length), np.int64)}
    reference = _torch_outputs(model, {"input_ids": ids, **whole}, use_cache=False)["logits"]
    cache, steps = _empty_cache(session, batch), ((0, PROMPT), (PROMPT, length))
    for begin, end in steps:
        feeds = {
            "input_ids": ids[:, begin:end],
            "attention_mask": whole["attention_mask"][:, :end],
            "position_ids": np.tile(np.arange(begin, end), (batch, 1)),
        }
        outputs = _run(session, feeds | cache)
        comparison.add("logits", reference[:, begin:end], outputs["logits"])
        cache = _as_past(outputs)


def _compare_encoder_decoder(
    model: PreTrainedModel,
    stem: str,
    session: ort.InferenceSession,
    comparison: Comparison,
    rng: np.random.Generator,
    batch: int,
    length: int,
) -> None:
    main = model.main_input_name
    source = {main: _made_up(main, model, rng, batch, length)}
    if main == "input_ids":
        source["attention_mask"] = _made_up("attention_mask", model, rng, batch, length)
    encoder: Any = model.get_encoder()  # type: ignore[operator]  # torch types every attribute as Tensor | Module
    # Tracing decoders leaves it set, and T5's encoder then asks for a cache that only decoders have.
    encoder.config.use_cache = False
    states = _torch_outputs(encoder, source)
    if "decoder" not in stem:
        compare_outputs(comparison, states, _run(session, source))
        return
    if "with_past" in stem:
        comparison.unverified = "it needs the cache of another graph; only merged decoders are run in steps"
        return
    ids = _made_up("decoder_input_ids", model, rng, batch, length)
    reference = _torch_outputs(model, source | {"decoder_input_ids": ids}, use_cache=False)["logits"]
    encoded = {
        "encoder_hidden_states": states["last_hidden_state"],
        "encoder_attention_mask": source.get(
            "attention_mask", np.ones(states["last_hidden_state"].shape[:2], np.int64)
        ),
    }
    merged = any(i.name == "use_cache_branch" for i in session.get_inputs())
    first = encoded | _empty_cache(session, batch) | {"use_cache_branch": np.array([False])}
    outputs = _run(session, first | {"input_ids": ids[:, :PROMPT]})
    comparison.add("logits", reference[:, :PROMPT], outputs["logits"])
    cache = _as_past(outputs)
    for position in range(PROMPT, length if merged else PROMPT):
        step = encoded | cache | {"use_cache_branch": np.array([True]), "input_ids": ids[:, position : position + 1]}
        outputs = _run(session, step)
        comparison.add("logits", reference[:, position : position + 1], outputs["logits"])
        # The step returns the encoder's part of the cache empty: it does not change.
        cache |= {n: v for n, v in _as_past(outputs).items() if ".decoder." in n}
