"""Models with random weights, for sizes and forms of graph that no test model has. Say so in any report: they
compute nothing useful.

    python tools/synthetic.py large OUT.onnx --layers 20 --hidden 1536     # 2.5 GB, external data, written as
    it is drawn python tools/synthetic.py encoder-decoder OUT_DIR                      # Marian-like, with a
    merged decoder; needs onnxq[export] python tools/synthetic.py decoder OUT_DIR
    # GPT-like, tied embedding; needs onnxq[export]

Weights are drawn from a Student t distribution with a few outlier channels, because group-wise methods have
nothing to do on normal ones.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

if __package__ in (None, ""):  # run as a script: the folder above holds `onnxq` and `tools`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from onnxq.errors import OutputExistsError

if TYPE_CHECKING:
    import torch

    from onnxq.export import ExportResult

ALIGNMENT = 4096
"""External tensors start at multiples of it, so that they can be memory-mapped one by one."""

PIECE = 1 << 20
"""Elements drawn at a time: 4 MB, whatever the model's size."""


@dataclass(frozen=True)
class StackShape:
    """Sizes of the large model: a residual stack of gated feed-forward and attention-shaped products, without
    the attention itself.

    A layer holds four [hidden, hidden] matrices, two [hidden, ffn] and one [ffn, hidden]; the table is
    [vocabulary, hidden] and is also the output layer's weight, through a Transpose.
    """

    layers: int = 20
    hidden: int = 1536
    ffn: int = 4096
    vocabulary: int = 32000
    degrees_of_freedom: float = 5.0
    outlier_channels: int = 4
    seed: int = 0

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.layers * (4 * self.hidden**2 + 3 * self.hidden * self.ffn) + self.vocabulary * self.hidden


def student_t(
    rng: np.random.Generator, rows: int, columns: int, degrees_of_freedom: float, outlier_rows: np.ndarray
) -> Iterator[np.ndarray]:
    """A random matrix [rows, columns], float32, in pieces of whole rows.

    Standard deviation 1 / sqrt(rows), as a layer with `rows` inputs has, except in the outlier rows, where it
    is ten times that.
    """
    scale = np.sqrt((degrees_of_freedom - 2) / degrees_of_freedom / rows)
    loud = np.ones((rows, 1), np.float32)
    loud[outlier_rows] = 10
    step = max(1, PIECE // columns)
    for start in range(0, rows, step):
        count = min(step, rows - start)
        drawn = rng.standard_t(degrees_of_freedom, (count, columns)) * scale
        yield drawn.astype(np.float32) * loud[start : start + count]


def write_large_model(path: Path, shape: StackShape) -> int:
    """Write the large model: `path` and its weights in `<path>.data`, never more than a few MB of them in
    memory.

    Returns:
        Bytes of both files.

    Raises:
        OutputExistsError: One of the files exists.
    """
    data = path.with_name(f"{path.name}.data")
    for taken in (path, data):
        if taken.exists():
            raise OutputExistsError(f"{taken} exists: remove it or choose another name")
    rng = np.random.default_rng(shape.seed)
    initializers: list[onnx.TensorProto] = []
    with data.open("xb") as file:

        def weight(name: str, rows: int, columns: int) -> str:
            file.write(b"\0" * (-file.tell() % ALIGNMENT))
            tensor = onnx.TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[rows, columns])
            tensor.data_location = TensorProto.EXTERNAL
            tensor.external_data.add(key="location", value=data.name)
            tensor.external_data.add(key="offset", value=str(file.tell()))
            tensor.external_data.add(key="length", value=str(rows * columns * 4))
            initializers.append(tensor)
            loud = rng.choice(rows, min(shape.outlier_channels, rows), replace=False)
            for piece in student_t(rng, rows, columns, shape.degrees_of_freedom, loud):
                file.write(piece.tobytes())
            return name

        nodes = _stack(shape, weight)
    small = {"one": np.ones(shape.hidden, np.float32), "epsilon_bias": np.zeros(shape.hidden, np.float32)}
    initializers += [onnx.numpy_helper.from_array(value, name) for name, value in small.items()]
    graph = helper.make_graph(
        nodes,
        "synthetic",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "tokens", shape.vocabulary])],
        initializers,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10, producer_name="onnxq synthetic"
    )
    path.write_bytes(model.SerializeToString())
    return path.stat().st_size + data.stat().st_size


def _stack(shape: StackShape, weight: Callable[[str, int, int], str]) -> list[onnx.NodeProto]:
    """The nodes; weights are written in the order in which they are used."""
    nodes = []

    def add(kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [output], name=f"{kind}:{output}", **attributes))
        return output

    hidden, ffn = shape.hidden, shape.ffn
    x = add("Gather", [weight("embed.weight", shape.vocabulary, hidden), "input_ids"], "embedded")
    for i in range(shape.layers):
        p = f"layers.{i}"
        normed = add("LayerNormalization", [x, "one", "epsilon_bias"], f"{p}.norm1", axis=-1)
        q, k, v = (
            add("MatMul", [normed, weight(f"{p}.{part}.weight", hidden, hidden)], f"{p}.{part}")
            for part in ("query", "key", "value")
        )
        gate = add("Sigmoid", [add("Mul", [q, k], f"{p}.score")], f"{p}.attention")
        mixed = add("Mul", [gate, v], f"{p}.mixed")
        out = add("MatMul", [mixed, weight(f"{p}.output.weight", hidden, hidden)], f"{p}.output")
        x = add("Add", [x, out], f"{p}.residual1")
        normed = add("LayerNormalization", [x, "one", "epsilon_bias"], f"{p}.norm2", axis=-1)
        gate = add(
            "Sigmoid",
            [add("MatMul", [normed, weight(f"{p}.gate.weight", hidden, ffn)], f"{p}.gate")],
            f"{p}.gated",
        )
        up = add("MatMul", [normed, weight(f"{p}.up.weight", hidden, ffn)], f"{p}.up")
        down = add(
            "MatMul",
            [add("Mul", [gate, up], f"{p}.wide"), weight(f"{p}.down.weight", ffn, hidden)],
            f"{p}.down",
        )
        x = add("Add", [x, down], f"{p}.residual2")
    x = add("LayerNormalization", [x, "one", "epsilon_bias"], "norm", axis=-1)
    add("MatMul", [x, add("Transpose", ["embed.weight"], "embed.transposed", perm=[1, 0])], "logits")
    return nodes


@dataclass(frozen=True)
class TransformerShape:
    """Sizes of the small models that go through transformers.

    The defaults are those of a Marian base model.
    """

    layers: int = 6
    hidden: int = 512
    heads: int = 8
    ffn: int = 2048
    vocabulary: int = 58101
    positions: int = 512
    seed: int = 0


def build_encoder_decoder(shape: TransformerShape, folder: Path) -> None:
    """Write a Marian model with random weights as a Hugging Face folder.

    Its three vocabulary-sized matrices are one tied weight.
    """
    import torch
    from transformers import MarianConfig, MarianMTModel

    torch.manual_seed(shape.seed)
    padding = shape.vocabulary - 1
    config = MarianConfig(
        vocab_size=shape.vocabulary,
        decoder_vocab_size=shape.vocabulary,
        d_model=shape.hidden,
        encoder_layers=shape.layers,
        decoder_layers=shape.layers,
        encoder_attention_heads=shape.heads,
        decoder_attention_heads=shape.heads,
        encoder_ffn_dim=shape.ffn,
        decoder_ffn_dim=shape.ffn,
        max_position_embeddings=shape.positions,
        activation_function="swish",
        scale_embedding=True,
        pad_token_id=padding,
        decoder_start_token_id=padding,
        bos_token_id=0,
        eos_token_id=0,
        forced_eos_token_id=0,
    )
    model = MarianMTModel(config)
    heavy_tails(model, shape.seed)
    model.save_pretrained(folder)


def build_decoder(shape: TransformerShape, folder: Path) -> None:
    """Write a GPT-2 model with random weights as a Hugging Face folder.

    Its output layer is tied to the token table.
    """
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(shape.seed)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=shape.vocabulary,
            n_embd=shape.hidden,
            n_layer=shape.layers,
            n_head=shape.heads,
            n_inner=shape.ffn,
            n_positions=shape.positions,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    heavy_tails(model, shape.seed)
    model.save_pretrained(folder)


def heavy_tails(model: torch.nn.Module, seed: int) -> None:
    """Draw all matrices anew from the heavy-tailed distribution; tied ones once."""
    import torch

    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 and parameter.requires_grad:
                rows, columns = parameter.shape
                loud = rng.choice(rows, min(2, rows), replace=False)
                matrix = np.concatenate(list(student_t(rng, rows, columns, 5.0, loud))) * np.sqrt(rows / columns)
                parameter.copy_(torch.from_numpy(matrix.astype(np.float32)))


def export_built(kind: str, shape: TransformerShape, out: Path) -> ExportResult:
    """Build an "encoder-decoder" or a "decoder" and export it to `out` by way of `onnxq.export`."""
    from onnxq.export import export

    with tempfile.TemporaryDirectory(prefix="onnxq-synthetic-") as temporary:
        (build_encoder_decoder if kind == "encoder-decoder" else build_decoder)(shape, Path(temporary))
        return export(Path(temporary), out)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, shape in (
        ("large", StackShape()),
        ("encoder-decoder", TransformerShape()),
        ("decoder", TransformerShape()),
    ):
        sub = kinds.add_parser(kind)
        sub.add_argument("out", type=Path)
        for name, value in vars(shape).items():
            sub.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args(arguments))
    kind, out = options.pop("kind"), options.pop("out")
    if kind == "large":
        written = write_large_model(out, StackShape(**options))
        print(f"{out}: {written / 1e9:.2f} GB, {StackShape(**options).weights / 1e6:.0f}M weights")
    else:
        result = export_built(kind, TransformerShape(**options), out)
        for graph in result.graphs:
            print(
                f"{graph.path}: {graph.bytes / 1e6:.1f} MB, {graph.nodes} nodes, "
                f"shared: {'; '.join(graph.shared) or 'none'}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
