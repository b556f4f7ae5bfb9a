"""A Hugging Face folder to ONNX through optimum's tracing exporter.

Optimum knows each architecture's inputs, cache layout and merged decoders; everything after its graphs
(opset, names, sharing, comparison with torch) is ours. Nothing is looked up on a hub and no code from the
folder is run.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from onnxq.errors import ExportError
from onnxq.export.finish import finish_graph
from onnxq.export.result import ExportedGraph
from onnxq.export.verify import checked, compare_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRACED_OPSET = 20
"""Highest opset of torch's tracing exporter; from here on graphs are converted."""

CARRIED_SUFFIXES = (".json", ".txt", ".model", ".spm", ".jinja", ".vocab", ".bpe")
"""Tokenizers and configs. Weights, code and read-mes stay behind."""

_MERGED = "decoder_model_merged.onnx"
_MERGED_FROM = ("decoder_model.onnx", "decoder_with_past_model.onnx")

_UNUSED_HEADS = ("pooler.",)
"""Parts that no exported output depends on: BERT's pooler is cut off in feature extraction."""


def export_folder(
    source: Path,
    out: Path,
    task: str | None,
    opset: int,
    tolerance: float | None,
    tell: Callable[[str], None],
) -> tuple[str, tuple[ExportedGraph, ...], tuple[str, ...]]:
    """Export the folder `source` into the existing, empty folder `out`.

    Returns:
        The task, the graphs, and the names of the files beside them.

    Raises:
        ExportError: Not a model folder, task unknown for this model, weights missing, or wrong results.
    """
    with quiet():
        tell(f"loading {source}")
        task, model = load_model(source, task)
        tell(f"tracing the graphs for {task}")
        raw = out / "raw"
        _trace(model, source, raw, task, min(opset, TRACED_OPSET))
        parameters = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        finished = {}
        for path in _needed(raw):
            tell(f"writing {path.name}")
            finished[out / path.name] = finish_graph(ir.load(path), out / path.name, opset, parameters)
        for path in raw.iterdir():
            if path.suffix in CARRIED_SUFFIXES:
                shutil.copy(path, out / path.name)
        shutil.rmtree(raw)
        _carry(source, out)
        carried = tuple(
            p.relative_to(out).as_posix()
            for p in sorted(out.rglob("*"))
            if p.is_file() and p.suffix in CARRIED_SUFFIXES
        )
        comparisons = {}
        if tolerance is not None:
            tell("comparing with torch")
            comparisons = compare_folder(model, out)
    graphs = tuple(checked(path, facts, comparisons.get(path.name), tolerance) for path, facts in finished.items())
    return task, graphs, carried


def _needed(raw: Path) -> list[Path]:
    """The graphs to keep.

    A merged decoder holds both steps with one set of weights, so the two single ones are left out.
    """
    paths = sorted(raw.glob("*.onnx"))
    if any(path.name == _MERGED for path in paths):
        return [path for path in paths if path.name not in _MERGED_FROM]
    return paths


def load_model(source: Path, task: str | None) -> tuple[str, PreTrainedModel]:
    """Load the torch model of a folder for a task, in float32.

    Returns:
        The task in optimum's full form ("text-generation-with-past") and the model in evaluation mode.

    Raises:
        ExportError: As in `export_folder`.
    """
    import optimum.exporters.onnx.model_configs  # noqa: F401  fills the table of supported tasks
    import torch
    from optimum.exporters.tasks import TasksManager
    from transformers import AutoConfig

    _refuse_no_model(source)
    try:
        config = AutoConfig.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ExportError(f"{source / 'config.json'} cannot be read: {error}") from error
    wanted = TasksManager.map_from_synonym(task) if task else _own_task(source, config)
    try:
        supported = TasksManager.get_supported_tasks_for_model_type(
            config.model_type, "onnx", library_name="transformers"
        )
    except KeyError as error:
        raise ExportError(
            f"optimum cannot export models of type {config.model_type!r} ({source}): "
            "build the model in torch and export it as a ModuleSource"
        ) from error
    if task is None and f"{wanted}-with-past" in supported:
        wanted = f"{wanted}-with-past"
    if wanted not in supported:
        raise ExportError(
            f"{source}: no task {wanted!r} for {config.model_type} models; there are {', '.join(sorted(supported))}"
        )
    plain = wanted.removesuffix("-with-past")
    kind = TasksManager.get_model_class_for_task(
        plain, framework="pt", model_type=config.model_type, model_class_name=None, library="transformers"
    )
    try:
        model, found = kind.from_pretrained(
            source,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except Exception as error:
        raise ExportError(f"the weights in {source} cannot be loaded for {wanted}: {error}") from error
    _refuse_random(source, wanted, found)
    model.config.use_cache = wanted.endswith("-with-past")
    return wanted, model.eval()


def _refuse_no_model(source: Path) -> None:
    if not source.is_dir():
        raise ExportError(
            f"{source} is not a folder on this machine: onnxq downloads no models; give the folder of a downloaded one"
        )
    if not (source / "config.json").is_file():
        raise ExportError(f"{source} holds no config.json: it is not a Hugging Face model folder")


def _own_task(source: Path, config: Any) -> str:
    """The task of the architecture that `config.json` names."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    try:
        if kind is None:
            raise ValueError(f"architectures is {names}")
        return str(TasksManager.infer_task_from_model(kind, library_name="transformers"))
    except (ValueError, KeyError, RuntimeError) as error:
        raise ExportError(
            f"the task of {source} cannot be told from its config.json ({error}): name one with --task"
        ) from error


def _refuse_random(source: Path, task: str, found: dict[str, Any]) -> None:
    """Refuse weights that are not in the folder: transformers would fill them with random numbers."""
    missing = [name for name in found["missing_keys"] if not name.startswith(_UNUSED_HEADS)]
    missing += [str(entry[0]) for entry in found.get("mismatched_keys", [])]
    if missing:
        shown = ", ".join(sorted(missing)[:4]) + (" ..." if len(missing) > 4 else "")
        raise ExportError(
            f"{source} lacks {len(missing)} of the weights that {task} needs ({shown}): "
            "they would be random numbers. "
            "Choose the task that the model was trained for, e.g. --task feature-extraction"
        )


def _trace(model: PreTrainedModel, source: Path, out: Path, task: str, opset: int) -> None:
    from optimum.exporters.onnx import onnx_export_from_model
    from optimum.utils.save_utils import maybe_load_preprocessors

    try:
        onnx_export_from_model(
            model=model,
            output=out,
            opset=opset,
            task=task,
            preprocessors=maybe_load_preprocessors(str(source), trust_remote_code=False),
            do_validation=False,
        )
    except Exception as error:
        raise ExportError(f"optimum could not export {source} for {task}: {type(error).__name__}: {error}") from error


def _carry(source: Path, out: Path) -> None:
    """Copy tokenizer and configs as they are; only `config.json` stays as the loaded model wrote it."""
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source)
        wanted = path.is_file() and path.suffix in CARRIED_SUFFIXES and not path.name.endswith(".index.json")
        if not wanted or any(part.startswith(".") for part in name.parts) or path.name == "config.json" == str(name):
            continue
        if len(name.parts) == 1 or (
            path.name == "config.json" and len(name.parts) == 2 and _is_module_of(source, name.parts[0])
        ):
            (out / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, out / name)


def _is_module_of(source: Path, folder: str) -> bool:
    """Whether `modules.json` of a sentence-transformers model lists this folder (pooling)."""
    listing = source / "modules.json"
    return listing.is_file() and folder in [
        entry.get("path") for entry in json.loads(listing.read_text(encoding="utf-8"))
    ]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep tracer warnings and the libraries' log lines below errors to themselves."""
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
