"""What `onnxq doctor` found, for the terminal."""

from __future__ import annotations

from rich.console import RenderableType
from rich.markup import escape
from rich.text import Text

from onnxq.report.tables import grouped, table
from onnxq.report.units import count, size
from onnxq.runtime.doctor import Diagnosis, Finding
from onnxq.runtime.environment import Environment
from onnxq.runtime.rules import Verdict

_STYLE = {Verdict.FAST: "green", Verdict.SLOW: "bold red", Verdict.FOLDED: "yellow", Verdict.FLOAT: "dim"}


def environment(found: Environment) -> list[RenderableType]:
    """The machine, the library and its test."""
    made = table("", " ", wide=(" ",))
    made.show_header = False
    library = found.library
    if library is not None:
        made.add_row("kernel library", f"{library.get('version')} at {library.get('path')}")
        made.add_row("instruction set", f"{library.get('isa')}: {library.get('reason')}")
        here = ", ".join(library.get("available", []))
        made.add_row("available here", f"{here} (the environment variable ONNXQ_ISA chooses)")
        if library.get("warning"):
            made.add_row("", Text(str(library["warning"]), style="yellow"))
    if found.test_error is not None:
        verdict = Text("works" if found.works else "FAILS", style="green" if found.works else "bold red")
        made.add_row("kernel test", Text.assemble(verdict, f", difference to numpy {found.test_error:.1e}"))
    made.add_row("ONNX Runtime", f"{found.onnxruntime}, providers {', '.join(found.providers)}")
    made.add_row("machine", f"{found.machine}, {count(found.cores or 0, 'core')}")
    return [made, problem(found)] if found.problem else [made]


def problem(found: Environment) -> Text:
    """Why the kernel library can't be used."""
    return Text(found.problem, style="red" if found.library is not None else "yellow")


def diagnosis(found: Diagnosis, *, verbose: bool) -> list[RenderableType]:
    """The nodes of a model by what becomes of them, worst first."""
    how = "with the kernel library" if found.library else "on stock ONNX Runtime"
    head = Text.assemble((found.path, "bold"), f"  {how}")
    if found.broken:
        return [head, Text(f"broken: {found.broken}", style="bold red")]
    counts = found.counts
    summary = Text("  ")
    for verdict in Verdict:
        if counts[verdict.value]:
            summary.append(f"{counts[verdict.value]} {verdict.value}  ", style=_STYLE[verdict])
    summary.append(f"  weights {size(found.file_bytes)} in the file, {size(found.memory_bytes)} in memory")
    if found.memory_bytes > 1.25 * found.file_bytes:
        summary.append(f" ({found.memory_bytes / max(found.file_bytes, 1):.1f} times)", style="yellow")
    made = table(
        "",
        ">nodes",
        "op",
        "what happens",
        ">in file",
        ">in memory",
        "such as",
        wide=("what happens", "such as"),
    )
    order = [Verdict.SLOW, Verdict.FOLDED, Verdict.FAST, Verdict.FLOAT]
    findings = sorted(found.findings, key=lambda finding: order.index(finding.verdict))
    groups = grouped(findings, lambda f: (f.verdict, f.op, f.what, f.cure) + ((f.node,) if verbose else ()))
    cures: dict[str, list[str]] = {}
    for group in groups.values():
        first: Finding = group[0]
        made.add_row(
            Text(first.verdict.value, style=_STYLE[first.verdict]), str(len(group)), first.op, first.what,
            size(sum(f.file_bytes for f in group)), size(sum(f.memory_bytes for f in group)),
            escape(first.node),
        )  # fmt: skip
        if first.cure:
            cures.setdefault(first.cure, []).append(f"{first.verdict.value} {first.op}")
    ways = [Text.assemble((f"{', '.join(dict.fromkeys(of))}: ", "yellow"), cure) for cure, of in cures.items()]
    return [head, summary, made, *ways]
