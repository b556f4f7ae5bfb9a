"""Train a small vision transformer on Fashion-MNIST, export it to ONNX and keep it in the cache folder.

    python -m tools.vit [--epochs 8] [--threads 1]

A real vision transformer with a task and data that need no registration is not to be had as a package, so this one is
trained: 1.2 million weights, some 20 minutes on one core. Prints the folder, which then holds

    model.onnx         pixel_values float32 [batch, 1, 28, 28] -> logits float32 [batch, 10]
    calibration.npz    pixel_values of 1,024 training pictures
    heldout.npz        pixel_values and labels of the 10,000 test pictures
    training.json      settings, seed and top-1 accuracy of the ONNX model on the test pictures

Training can be stopped and goes on from the last whole epoch. Needs the extra `export` of onnxq.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if __package__ in (None, ""):  # run as a script: the folder above holds `onnxq` and `tools`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from onnxq.errors import OnnxqError
from tools.fashion import Pictures, load, normalise
from tools.models import cache_folder, fetch

if TYPE_CHECKING:
    import torch

FOLDER = "vit-fashion"
CALIBRATION_PICTURES = 1024
WARM_UP = 0.3
"""Share of the steps in which the learning rate rises."""


@dataclass(frozen=True)
class Settings:
    """Of the model and its training; the same settings give the same model, up to summation order."""

    hidden: int = 128
    layers: int = 6
    heads: int = 4
    ffn: int = 512
    patch: int = 7
    epochs: int = 8
    batch: int = 64
    peak_rate: float = 1.5e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.05
    seed: int = 0


def learning_rate(step: int, steps: int, peak: float) -> float:
    """One cycle (Smith and Topin, 2017, arXiv:1708.07120): up from peak/25 and down to nearly 0, along cosines."""
    rise = WARM_UP * steps
    if step < rise:
        low, share = peak / 25, 1 - step / rise
    else:
        low, share = peak / 1e5, (step - rise) / max(steps - rise, 1)
    return low + (peak - low) * (1 + math.cos(math.pi * share)) / 2


def build(settings: Settings) -> torch.nn.Module:
    """The model with random weights; called with `pixel_values`, it returns logits."""
    import torch
    from transformers import ViTConfig, ViTForImageClassification

    class Classifier(torch.nn.Module):
        """Returns the tensor of logits, not transformers' object."""

        def __init__(self) -> None:
            super().__init__()
            self.model = ViTForImageClassification(
                ViTConfig(
                    image_size=28,
                    num_channels=1,
                    patch_size=settings.patch,
                    hidden_size=settings.hidden,
                    num_hidden_layers=settings.layers,
                    num_attention_heads=settings.heads,
                    intermediate_size=settings.ffn,
                    hidden_dropout_prob=0.0,
                    attention_probs_dropout_prob=0.0,
                    num_labels=10,
                )
            )

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.model(pixel_values=pixel_values).logits

    torch.manual_seed(settings.seed)
    return Classifier()


def train(
    model: torch.nn.Module, pictures: Pictures, settings: Settings, checkpoint: Path, console: Console
) -> torch.nn.Module:
    """Train `model` in place: AdamW, one cycle, label smoothing, pictures flipped left to right at random.

    Args:
        checkpoint: Written after each epoch; where it is there and has the same settings, training goes on from it.
    """
    import torch

    steps_per_epoch = len(pictures.labels) // settings.batch
    steps = steps_per_epoch * settings.epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.peak_rate, weight_decay=settings.weight_decay)
    first = _resume(model, optimizer, settings, checkpoint)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("training", total=steps, completed=first * steps_per_epoch)
        model.train()
        for epoch in range(first, settings.epochs):
            # One generator an epoch: what an epoch sees does not depend on where training was stopped.
            rng = np.random.default_rng((settings.seed, epoch))
            order = rng.permutation(len(pictures.labels))
            flipped = rng.random(len(order)) < 0.5
            losses = 0.0
            for index in range(steps_per_epoch):
                part = order[index * settings.batch : (index + 1) * settings.batch]
                pixels = pictures.pixels[part]
                turned = flipped[part]
                pixels[turned] = pixels[turned][..., ::-1]
                step = epoch * steps_per_epoch + index
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps, settings.peak_rate)
                loss = torch.nn.functional.cross_entropy(
                    model(torch.from_numpy(normalise(pixels))),
                    torch.from_numpy(pictures.labels[part]),
                    label_smoothing=settings.label_smoothing,
                )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                losses += loss.item()
                progress.advance(bar)
            _save(model, optimizer, settings, epoch + 1, checkpoint)
            console.print(f"epoch {epoch + 1}: mean loss {losses / steps_per_epoch:.4f}")
    return model.eval()


def _save(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, epochs_done: int, path: Path
) -> None:
    from safetensors.torch import save_file

    tensors = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")
    header = {"epochs_done": str(epochs_done), "settings": json.dumps(dataclasses.asdict(settings))}
    save_file(tensors, fresh, metadata=header)
    os.replace(fresh, path)


def _resume(model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: Settings, path: Path) -> int:
    """Take model and optimizer from the checkpoint; returns how many epochs are done.

    Raises:
        OnnxqError: The checkpoint has other settings.
    """
    import torch
    from safetensors import safe_open

    if not path.exists():
        return 0
    with safe_open(path, "pt") as stored:
        header = stored.metadata()
        if json.loads(header["settings"]) != dataclasses.asdict(settings):
            raise OnnxqError(
                f"{path} is a checkpoint of a training with other settings ({header['settings']}): give these, or "
                "remove it to start anew"
            )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(stored.get_tensor(f"model.{name}"))
                optimizer.state[parameter] = {
                    key: stored.get_tensor(f"optimizer.{key}.{name}") for key in ("step", "exp_avg", "exp_avg_sq")
                }
    return int(header["epochs_done"])


def write_folder(
    model: torch.nn.Module, train_set: Pictures, test_set: Pictures, settings: Settings, folder: Path
) -> float:
    """Write the finished folder, complete or not at all.

    Returns:
        Top-1 accuracy of the ONNX model on the test pictures.
    """
    import torch

    from onnxq.evaluation.accuracy import top1
    from onnxq.export import ModuleSource, export

    chosen = np.sort(np.random.default_rng(settings.seed).choice(len(train_set.labels), CALIBRATION_PICTURES, False))
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "new"
        example = {"pixel_values": torch.from_numpy(test_set.normalised()[:4])}
        export(ModuleSource(model, example, output_names=("logits",)), fresh)
        np.savez(fresh / "calibration.npz", pixel_values=normalise(train_set.pixels[chosen]))
        np.savez(fresh / "heldout.npz", pixel_values=test_set.normalised(), labels=test_set.labels)
        found = top1(fresh / "model.onnx", fresh / "heldout.npz")
        record = {"top1": found.top1, "pictures": found.samples, "settings": dataclasses.asdict(settings)}
        (fresh / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        fresh.rename(folder)
    return found.top1


def prepare(
    cache: Path | None = None, settings: Settings | None = None, threads: int = 1, console: Console | None = None
) -> Path:
    """Folder of the trained model, trained first where the cache does not hold it.

    Raises:
        OnnxqError: The pictures cannot be had, or a checkpoint of another training is in the way.
    """
    folder = (cache or cache_folder()) / FOLDER
    if (folder / "model.onnx").is_file():
        return folder
    import torch

    torch.set_num_threads(threads)
    settings, console = settings or Settings(), console or Console(stderr=True)
    train_set, test_set = load(fetch("fashion-mnist", cache))
    checkpoint = folder.with_name(f"{FOLDER}.checkpoint.safetensors")
    model = train(build(settings), train_set, settings, checkpoint, console)
    accuracy = write_folder(model, train_set, test_set, settings, folder)
    console.print(f"top-1 on {len(test_set.labels):,} test pictures: {accuracy:.2%}")
    checkpoint.unlink()
    return folder


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=Settings.epochs)
    parser.add_argument("--seed", type=int, default=Settings.seed)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    try:
        print(prepare(settings=Settings(epochs=options.epochs, seed=options.seed), threads=options.threads))
    except OnnxqError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
