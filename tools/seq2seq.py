"""Encoder-decoders through optimum: folders of graphs as users have them, with a merged decoder or two separate ones.

    python -m tools.seq2seq marian OUT [--separate] [--layers 6 --hidden 512 ...]
    python -m tools.seq2seq t5 OUT [--separate]

The models here are of the real architectures, with random weights from a heavy-tailed distribution: they compute
nothing useful, and reports must say so. `tools/whisper.py` exports its real model in the same way. Needs the extra
`export` of onnxq.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the folder above holds `onnxq` and `tools`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from onnxq.errors import OnnxqError, OutputExistsError
from tools.synthetic import TransformerShape, build_encoder_decoder, heavy_tails

TINY = TransformerShape(layers=2, hidden=64, heads=4, ffn=96, vocabulary=260, positions=64)
"""For tests."""

MARIAN_BASE = TransformerShape()
T5_SMALL = TransformerShape(layers=6, hidden=512, heads=8, ffn=2048, vocabulary=32128)

OPSET = 21

MERGED = ("encoder_model.onnx", "decoder_model_merged.onnx")
SEPARATE = ("encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx")


def build_t5(shape: TransformerShape, folder: Path) -> None:
    """Write a T5 model with random weights as a Hugging Face folder: relative positions, and a tied embedding."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(shape.seed)
    config = T5Config(
        vocab_size=shape.vocabulary,
        d_model=shape.hidden,
        d_kv=shape.hidden // shape.heads,
        d_ff=shape.ffn,
        num_layers=shape.layers,
        num_decoder_layers=shape.layers,
        num_heads=shape.heads,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    model = T5ForConditionalGeneration(config)
    heavy_tails(model, shape.seed)
    model.save_pretrained(folder)


BUILDERS: dict[str, Callable[[TransformerShape, Path], None]] = {"marian": build_encoder_decoder, "t5": build_t5}
SHAPES = {"marian": MARIAN_BASE, "t5": T5_SMALL}


def export_seq2seq(source: Path, out: Path, merged: bool = True, tell: Callable[[str], None] = lambda _: None) -> None:
    """Export a Hugging Face folder of an encoder-decoder with its cache.

    Args:
        out: A new folder. It gets `encoder_model.onnx`, and `decoder_model_merged.onnx` (one graph with both
            kinds of step, chosen by `use_cache_branch`) or `decoder_model.onnx` (the first step) and
            `decoder_with_past_model.onnx` (all later ones); tokenizer and configs beside them.
        tell: Called with a line at the start of each step.

    Raises:
        ExportError: The source cannot be loaded.
        OutputExistsError: `out` exists.
    """
    import onnx_ir as ir
    from optimum.exporters.onnx import onnx_export_from_model

    from onnxq.export.finish import finish_graph
    from onnxq.export.huggingface import CARRIED_SUFFIXES, TRACED_OPSET, load_model, quiet

    if out.exists():
        raise OutputExistsError(f"{out} exists: remove it or choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as temporary, quiet():
        raw, fresh = Path(temporary) / "raw", Path(temporary) / "new"
        fresh.mkdir()
        task, model = load_model(source, None)
        tell(f"tracing the graphs for {task}")
        onnx_export_from_model(
            model=model, output=raw, opset=TRACED_OPSET, task=task, do_validation=False, no_post_process=not merged
        )
        parameters = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
        for name in MERGED if merged else SEPARATE:
            tell(f"writing {name}")
            finish_graph(ir.load(raw / name), fresh / name, OPSET, parameters)
        for folder in (source, raw):
            for path in folder.iterdir():
                if path.suffix in CARRIED_SUFFIXES:
                    shutil.copy(path, fresh / path.name)
        fresh.rename(out)


def make(kind: str, out: Path, shape: TransformerShape | None = None, merged: bool = True) -> Path:
    """Build a model with random weights and export it.

    Args:
        kind: "marian" or "t5".
        out: A new folder.
        shape: Sizes; Marian base and T5-small where None.

    Returns:
        `out`.
    """
    with tempfile.TemporaryDirectory(prefix="onnxq-seq2seq-") as temporary:
        BUILDERS[kind](shape or SHAPES[kind], Path(temporary))
        export_seq2seq(Path(temporary), out, merged)
    return out


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, shape in SHAPES.items():
        sub = kinds.add_parser(kind)
        sub.add_argument("out", type=Path)
        sub.add_argument("--separate", action="store_true", help="two graphs for the decoder instead of a merged one")
        for name, value in vars(shape).items():
            sub.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    kind, out, separate = (options.pop(name) for name in ("kind", "out", "separate"))
    try:
        print(make(kind, out, TransformerShape(**options), merged=not separate))
    except OnnxqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
