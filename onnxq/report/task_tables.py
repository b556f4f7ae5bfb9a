"""Task metrics for the terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from onnxq.evaluation.accuracy import AccuracyReport
from onnxq.evaluation.perplexity import PerplexityReport
from onnxq.evaluation.tasks import AccuracyTask, PerplexityTask, TaskReport
from onnxq.report.tables import table
from onnxq.report.units import count, percent


def task_report(found: TaskReport, model: Path, reference: Path | None) -> list[RenderableType]:
    """What a model, and a reference where there is one, reach at a task."""
    if isinstance(found, PerplexityTask):
        return _perplexity(found, _names(model, reference))
    if isinstance(found, AccuracyTask):
        return _accuracy(found, _names(model, reference))
    made = table(">sentences", ">mean cosine", ">1st percentile", ">smallest", ">Spearman", ">same nearest")
    similar = found.model
    made.add_row(
        f"{similar.sentences:,}",
        f"{similar.cosine_mean:.4f}",
        f"{similar.cosine_p01:.4f}",
        f"{similar.cosine_min:.4f}",
        f"{similar.spearman:.4f}",
        percent(similar.nearest),
    )
    model_name, reference_name = _names(model, reference)
    return [Text(f"embeddings of {model_name} against those of {reference_name}", style="dim"), made]


def _names(model: Path, reference: Path | None) -> tuple[str, str]:
    """File names; paths where those are the same."""
    if reference is None or reference.name != model.name:
        return model.name, "" if reference is None else reference.name
    return str(model), str(reference)


def _perplexity(found: PerplexityTask, names: tuple[str, str]) -> list[RenderableType]:
    one = found.model
    made = table("model", ">perplexity", ">nats a token", ">ratio", wide=("model",))

    def row(name: str, report: PerplexityReport, ratio: str) -> None:
        made.add_row(escape(name), f"{report.perplexity:.3f}", f"{report.nll:.4f}", ratio)

    if found.reference is not None:
        row(names[1], found.reference, "")
    row(names[0], one, "" if found.change is None else f"{found.change.ratio:.4f}")
    head = f"{count(one.windows, 'window')} of {one.context} tokens, {one.tokens:,} tokens scored"
    shown: list[RenderableType] = [Text(head, style="dim"), made]
    if found.change is not None:
        change = found.change
        shown.append(
            Text(f"rise {change.nll:+.4f} nats a token, standard error {change.standard_error:.4f}", style="dim")
        )
    return shown


def _accuracy(found: AccuracyTask, names: tuple[str, str]) -> list[RenderableType]:
    made = table("model", ">top-1", ">standard error", ">correct", wide=("model",))

    def row(name: str, report: AccuracyReport) -> None:
        made.add_row(
            escape(name),
            f"{100 * report.top1:.2f} %",
            f"{100 * report.standard_error:.2f} %",
            f"{report.correct:,} of {report.samples:,}",
        )

    if found.reference is not None:
        row(names[1], found.reference)
    row(names[0], found.model)
    if found.change is None:
        return [made]
    change = found.change
    said = (
        f"change {100 * change.top1:+.2f} points: {change.lost:,} lost, {change.won:,} won; "
        f"same class for {percent(change.agreement)}"
    )
    return [made, Text(said, style="dim")]
