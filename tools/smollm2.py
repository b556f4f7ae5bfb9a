"""SmolLM2-135M as a float32 ONNX model whose weights lie on no grid, kept in the cache folder.

    python -m tools.smollm2

The packaged weights are 4-bit (Q4_1). Rounded to 4 bits in groups of 32 they would lose exactly nothing, and any
method would look perfect. So the model is rescaled first: inputs of q/k/v and gate/up against the norm before them,
rows of up against columns of down, rows of v against columns of o, by random factors between 1/1.1 and 1.1. This
leaves the function as it is and takes the weights off the grid. What is measured on the result says which method is
better than which, and not what a method costs on the float model that its makers trained: the noise of 4 bits is in it
already.

Prints the folder, which then holds

    model.onnx, model.onnx.data   input_ids, attention_mask, position_ids -> logits [batch, tokens, 49152]; no cache
    tokenizer.json, config.json   and what else belongs to a Hugging Face folder
    source.json                   span and seed of the factors, and how far they moved the logits

Needs the extras `export` and `gguf` of onnxq, and 3.2 GB of memory.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir

if __package__ in (None, ""):  # run as a script: the folder above holds `onnxq` and `tools`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from onnxq.errors import ExportError, OnnxqError
from tools.models import SMOLLM2, cache_folder, fetch

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM

FOLDER = "smollm2-onnx"
SPAN = 1.1
SEED = 1
SAME_FUNCTION = 1e-4
"""Largest change of the logits that rescaling may make in float32, relative to the largest logit."""

PROMPT = "The capital of France is Paris. The river that runs through it is called the"


def rescale(model: LlamaForCausalLM, span: float = SPAN, seed: int = SEED) -> None:
    """Multiply and divide weights of a Llama-like model in place so that its function stays as it is.

    Factors are exp(u), u uniform in -log(span) to log(span).
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    config = model.config
    repeats = config.num_attention_heads // config.num_key_value_heads

    def factors(count: int) -> torch.Tensor:
        return torch.exp((torch.rand(count, generator=generator) - 0.5) * 2 * math.log(span))

    with torch.no_grad():
        for layer in model.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            for norm, readers in (
                (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                s = factors(norm.weight.shape[0])
                norm.weight /= s
                for reader in readers:
                    reader.weight *= s
            s = factors(mlp.up_proj.weight.shape[0])
            mlp.up_proj.weight *= s[:, None]
            mlp.down_proj.weight /= s
            s = factors(attention.v_proj.weight.shape[0])
            attention.v_proj.weight *= s[:, None]
            # Every query head of a group reads the same value head.
            attention.o_proj.weight /= s.view(-1, 1, config.head_dim).expand(-1, repeats, -1).reshape(-1)


def write_rescaled(source: Path, folder: Path) -> float:
    """Write the rescaled model of the artefact `source` and its tokenizer as a Hugging Face folder, float32.

    Returns:
        Largest change of the logits of `PROMPT`, relative to the largest logit.

    Raises:
        ExportError: A package is missing, or the rescaled model computes something else.
    """
    import torch

    try:
        import accelerate  # noqa: F401  transformers asks for it
        import gguf  # noqa: F401
    except ImportError as error:
        raise ExportError(f"reading GGUF needs {error.name}: run `pip install onnxq[export,gguf]`") from error
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from onnxq.export.huggingface import quiet

    (name,) = SMOLLM2.hashes
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=name, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        before = model(**prompt).logits
    rescale(model)
    with torch.inference_mode():
        moved = float((model(**prompt).logits - before).abs().max() / before.abs().max())
    if moved > SAME_FUNCTION:
        raise ExportError(
            f"rescaling moved the logits by {moved:.1e} of the largest: the model is not laid out as Llama"
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # The file that the tokenizer was read from is copied under this name: here the weights, and tokenizer.json has all.
    (folder / "tokenizer.model").unlink(missing_ok=True)
    return moved


def prepare(cache: Path | None = None, tell: Callable[[str], None] = lambda _: None) -> Path:
    """Folder of the exported model, made first where the cache does not hold it.

    Args:
        tell: Called with a line at the start of each step.

    Raises:
        OnnxqError: The weights cannot be had, or a package for the export is missing.
    """
    folder = (cache or cache_folder()) / FOLDER
    if (folder / "model.onnx").is_file():
        return folder
    from onnxq.export import export
    from onnxq.export.exporter import require_extra

    require_extra()
    source = fetch(SMOLLM2, cache)
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=folder.parent) as temporary:
        tell("rescaling")
        moved = write_rescaled(source, Path(temporary) / "rescaled")
        exported = Path(temporary) / "exported"
        export(Path(temporary) / "rescaled", exported, task="text-generation", progress=tell)
        shutil.rmtree(Path(temporary) / "rescaled")
        tell("moving the weights to external data")
        whole = (exported / "model.onnx").rename(Path(temporary) / "whole.onnx")
        ir.save(ir.load(whole), exported / "model.onnx", external_data="model.onnx.data")
        record = {"package": str(SMOLLM2.providers[0].package), "span": SPAN, "seed": SEED, "logits_moved": moved}
        (exported / "source.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        exported.rename(folder)
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
