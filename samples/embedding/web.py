"""The files of the demo in onnxruntime-web under Node: their third life, with no library and no change.

    python -m samples.embedding.web      # after samples.embedding.demo

Prints, for each file, how near the token vectors of one sentence are to those of the float model in the same runtime,
and the time of a run on one wasm thread.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from samples.embedding.demo import model_bytes
from tools.models import cache_folder
from tools.web import install, run

SENTENCE = "The quick brown fox jumps over the lazy dog, and nobody who watched it believed what they had seen."


def main(
    folder: Annotated[Path | None, typer.Option(help="Where the demo wrote its models; default: in the cache.")] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each model.")] = 20,
) -> None:
    """Runs every model of the demo in Node."""
    folder = folder or cache_folder() / "demo"
    tokenizer = Tokenizer.from_file(str(folder / "minilm-fp32" / "tokenizer.json"))
    tokenizer.no_padding()
    encoded = tokenizer.encode(SENTENCE)
    feeds = {
        "input_ids": np.array([encoded.ids]),
        "attention_mask": np.array([encoded.attention_mask]),
        "token_type_ids": np.array([encoded.type_ids]),
    }
    web = install(cache_folder() / "web")
    reference = folder / "minilm-fp32" / "model.onnx"
    expected = None
    table = Table("model", "bytes on disk", "cosine of token vectors", "ms", title=f"{len(encoded.ids)} tokens")
    for model in [reference, *sorted(folder.glob("minilm-*bit-*.onnx"), reverse=True)]:
        found = run(web, model, feeds, repeats)
        vectors = found.outputs["last_hidden_state"].ravel()
        expected = vectors if expected is None else expected
        cosine = float(vectors @ expected / np.linalg.norm(vectors) / np.linalg.norm(expected))
        name = "fp32" if model == reference else model.stem
        table.add_row(name, f"{model_bytes(model):,}", f"{cosine:.4f}", f"{found.run_ms:.1f}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
