"""The command line from the outside: exit codes, what goes where, and each command on a small model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner, Result

from onnxq.cli import app
from onnxq.cli.options import adjusted_recipe
from onnxq.cli.output import as_data
from onnxq.errors import OnnxqError
from onnxq.recipe import FrameSpec, Recipe
from onnxq.runtime.library import LIBRARY_VARIABLE
from onnxq.runtime.rules import Verdict
from tests.runtime import models

COMMANDS = ("export", "quantize", "inspect", "compare", "eval", "bench", "doctor", "recipes")


def run(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def run_json(*words: object) -> Any:
    result = run(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """float.onnx, small.onnx (3 bits) and data.npz."""
    made = tmp_path_factory.mktemp("cli")
    models.encoder(made / "float.onnx")
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 96, (12, 6))
    np.savez(made / "data.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    result = run("quantize", made / "float.onnx", made / "small.onnx", "--width", 3, "--group-size", 32)
    assert result.exit_code == 0, result.stderr
    return made


@pytest.fixture
def no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))


def test_help_lists_every_command() -> None:
    result = run("--help")
    assert result.exit_code == 0
    assert all(command in result.stdout for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "--json" in result.stdout


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0
    assert result.stdout.startswith("onnxq ")
    assert "ONNX Runtime" in result.stdout


def test_an_error_is_one_message_on_the_error_stream(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "none.onnx")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert "none.onnx" in result.stderr.replace("\n", "")
    assert "Traceback" not in result.stderr


def test_brackets_in_an_error_are_not_markup(tmp_path: Path) -> None:
    result = run("inspect", tmp_path / "[red]none[/].onnx")
    assert "[red]none[/].onnx" in result.stderr.replace("\n", "")


def test_a_wrong_option_is_a_usage_error(tmp_path: Path) -> None:
    assert run("quantize", tmp_path, tmp_path, "--target", "gpu").exit_code == 2


def test_an_interrupt_says_how_to_go_on(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxq.pipeline.quantize", stop)
    result = run("quantize", folder / "float.onnx", tmp_path / "out.onnx")
    assert result.exit_code == 130
    assert "same command again" in result.stderr


def test_quantize_shows_what_it_did(folder: Path, tmp_path: Path) -> None:
    result = run("quantize", folder / "float.onnx", tmp_path / "out.onnx", "--width", 4)
    assert result.exit_code == 0, result.stderr
    for said in (
        "out.onnx",
        "embed.weight",
        "uniform 4-bit",
        "rank 1: bias or norm parameter",
        "no calibration data",
    ):
        assert said in result.stdout
    assert (tmp_path / "out.onnx").is_file()
    assert "solving" in result.stderr


def test_quantize_json(folder: Path, tmp_path: Path) -> None:
    report = run_json("quantize", folder / "float.onnx", tmp_path / "out.onnx", "--bits", 4.5, "--seed", 7)
    assert report["linear_bits"] <= 4.5
    assert report["asked"] == {"size": None, "bits": 4.5, "table_bits": None, "max_error": None}
    assert report["recipe"]["seed"] == 7
    assert len(report["weights"]) == 5
    assert report["bytes"] == sum(file.stat().st_size for file in tmp_path.glob("out.onnx*"))


def test_quantize_with_data_reports_the_output_error(folder: Path, tmp_path: Path) -> None:
    report = run_json(
        "quantize",
        folder / "float.onnx",
        tmp_path / "out.onnx",
        "--width",
        4,
        "--calibration",
        folder / "data.npz",
    )
    assert report["check"]["samples"] == 12
    assert 0 < report["check"]["relative_errors"]["hidden"] < 1


def test_a_plan_writes_nothing(folder: Path, tmp_path: Path) -> None:
    plan = run_json("quantize", folder / "float.onnx", tmp_path / "out.onnx", "--plan", "--width", 2)
    assert plan["planned"]
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_kept(folder: Path) -> None:
    before = (folder / "small.onnx").read_bytes()
    result = run("quantize", folder / "float.onnx", folder / "small.onnx")
    assert result.exit_code == 1
    assert (folder / "small.onnx").read_bytes() == before


def test_a_folder_becomes_a_folder(folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    for name in ("encoder.onnx", "decoder.onnx"):
        (source / name).write_bytes((folder / "float.onnx").read_bytes())
    (source / "config.json").write_text("{}")
    plan = run_json("quantize", source, tmp_path / "out", "--plan")
    assert set(plan["graphs"]) == {"encoder.onnx", "decoder.onnx"}
    assert not (tmp_path / "out").exists()
    result = run("quantize", source, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.count("mean with all side data") == 2
    assert {file.name for file in (tmp_path / "out").iterdir()} >= {
        "encoder.onnx",
        "decoder.onnx",
        "config.json",
    }
    size = int(1.2 * sum(file.stat().st_size for file in (tmp_path / "out").glob("*.onnx*")))
    sized = run("quantize", source, tmp_path / "other", "--size", f"{size}B")
    assert sized.exit_code == 0, sized.stderr
    assert f"asked for at most {size:,} bytes" in sized.stdout
    assert sum(file.stat().st_size for file in (tmp_path / "other").glob("*.onnx*")) <= size


@pytest.mark.parametrize("words", [("--size", "1MB"), ("--bits", 3)])
def test_a_width_and_a_budget_exclude_each_other(folder: Path, tmp_path: Path, words: tuple[object, ...]) -> None:
    result = run("quantize", folder / "float.onnx", tmp_path / "out.onnx", "--width", 4, *words)
    assert result.exit_code == 1
    assert "--width" in result.stderr


def test_options_change_the_recipe() -> None:
    base = Recipe.load("uniform")
    assert adjusted_recipe("uniform", width=None, group_size=None, redundancy=None, target=None, seed=None) == base
    changed = adjusted_recipe("uniform", width=2, group_size="column", redundancy=1.25, target="stock", seed=5)
    assert (changed.linear.grid.bits, changed.linear.grid.group_size) == (2, "column")
    assert changed.tables.grid is not None
    assert changed.tables.grid.bits == 4
    assert (changed.target, changed.seed) == ("stock", 5)
    assert changed.linear.frame == FrameSpec(1.25)
    paper = adjusted_recipe("framequant-paper", width=None, group_size=None, redundancy=1.5, target=None, seed=None)
    assert paper.linear.frame == FrameSpec(1.5)
    assert paper.linear.solver == Recipe.load("framequant-paper").linear.solver


@pytest.mark.parametrize("value", [0.5, 9])
def test_a_redundancy_out_of_range(folder: Path, tmp_path: Path, value: float) -> None:
    result = run("quantize", folder / "float.onnx", tmp_path / "out.onnx", "--redundancy", value)
    assert result.exit_code == 1
    assert "1 to 8" in result.stderr


def test_a_redundancy_puts_weights_in_a_frame(folder: Path, tmp_path: Path) -> None:
    words = ("--redundancy", 1.5, "--width", 3)
    plain = run_json("quantize", folder / "float.onnx", tmp_path / "framed.onnx", *words)
    linear = [weight for weight in plain["weights"] if weight["kinds"] == ["linear"]]
    assert linear
    assert all(weight["format"].endswith("in frame 1.5") for weight in linear)


@pytest.mark.parametrize("size", ["abc", "20XB"])
def test_a_size_that_is_none(folder: Path, tmp_path: Path, size: str) -> None:
    result = run("quantize", folder / "float.onnx", tmp_path / "out.onnx", "--size", size)
    assert result.exit_code == 1
    assert size in result.stderr


def test_inspect(folder: Path, tmp_path: Path) -> None:
    result = run("inspect", folder / "small.onnx", "--html", tmp_path / "page.html", "--node-data", tmp_path / "n.json")
    assert result.exit_code == 0, result.stderr
    assert "layer.1.down.weight" in result.stdout
    assert "3.75" in result.stdout
    assert (tmp_path / "page.html").read_text().endswith("</html>\n")
    assert json.loads((tmp_path / "n.json").read_text())["results"]


def test_inspect_json_measures_errors(folder: Path) -> None:
    plain = run_json("inspect", folder / "small.onnx", "--reference", folder / "float.onnx")
    assert plain["file_bytes"] == sum(file.stat().st_size for file in folder.glob("small.onnx*"))
    assert all(weight["measured"] for weight in plain["weights"])
    assert plain["report"]["recipe"]["linear"]["grid"]["bits"] == 3


def test_inspect_sites(folder: Path) -> None:
    plain = run_json("inspect", folder / "float.onnx", "--sites")
    assert {site["name"] for weight in plain["weights"] for site in weight["sites"]} >= {
        "/embed/Gather",
        "/layer.0/up/MatMul",
    }
    assert "/layer.0/up/MatMul" in run("inspect", folder / "float.onnx", "--sites").stdout


def test_compare(folder: Path) -> None:
    words = (
        "compare",
        folder / "float.onnx",
        folder / "small.onnx",
        "--data",
        folder / "data.npz",
        "--layers",
    )
    plain = run_json(*words)
    (output,) = plain["comparison"]["outputs"]
    assert plain["comparison"]["samples"] == 12
    assert 0 < output["relative"] < 1
    assert output["cosine"] > 0.8
    assert len(plain["layers"]) >= 4
    assert "hidden" in run(*words).stdout


def test_a_model_compared_with_itself_is_exact(folder: Path) -> None:
    result = run("compare", folder / "float.onnx", folder / "float.onnx", "--data", folder / "data.npz")
    assert "exact" in result.stdout
    plain = run_json("compare", folder / "float.onnx", folder / "float.onnx", "--data", folder / "data.npz")
    assert plain["comparison"]["outputs"][0]["snr_db"] is None  # infinite: no number in JSON


def test_bench(folder: Path) -> None:
    words = (
        "bench",
        folder / "small.onnx",
        "--vs",
        folder / "float.onnx",
        "--repeats",
        3,
        "--length",
        5,
        "--no-load",
    )
    plain = run_json(*words, "--threads", 1)
    names = [timing["name"] for timing in plain["latency"]["timings"]]
    assert names == ["float.onnx", "small.onnx"]
    assert plain["latency"]["timings"][0]["ratio"] == 1
    assert plain["latency"]["shapes"] == {"input_ids": [1, 5], "attention_mask": [1, 5]}
    assert "small.onnx" in run(*words, "--no-library").stdout


def test_bench_measures_loading(folder: Path) -> None:
    plain = run_json("bench", folder / "float.onnx", "--repeats", 3, "--data", folder / "data.npz", "--batch", 4)
    assert plain["latency"]["shapes"]["input_ids"] == [4, 6]
    assert plain["load"]["float.onnx"]["create_seconds"] > 0


def test_doctor_without_a_library_is_no_failure(no_library: None) -> None:
    plain = run_json("doctor")
    assert plain["environment"]["library"] is None
    assert LIBRARY_VARIABLE in plain["environment"]["problem"]
    assert "ONNX Runtime" in run("doctor").stdout


def test_doctor_with_the_library(library: Path) -> None:
    plain = run_json("doctor")
    assert plain["environment"]["library"]["path"] == str(library)
    assert "works" in run("doctor").stdout


def test_doctor_on_a_model(folder: Path) -> None:
    (found,) = run_json("doctor", folder / "small.onnx", "--no-library")["models"]
    assert found["library"] is False
    assert found["counts"]["folded"] >= 5
    assert all(finding["cure"] for finding in found["findings"] if finding["verdict"] != "float")
    shown = run("doctor", folder / "small.onnx", "--no-library").stdout
    assert "folded" in shown
    assert "library_path" in shown


def test_doctor_opens_our_models_both_ways(folder: Path, library: Path) -> None:
    first, second = run_json("doctor", folder / "small.onnx")["models"]
    assert (first["library"], second["library"]) == (True, False)
    assert first["counts"] == {"fast": 5, "slow": 0, "folded": 0, "float": 0}


def test_doctor_on_a_broken_model_fails(tmp_path: Path) -> None:
    result = run("doctor", models.nbits(tmp_path / "m.onnx", bits=3), "--no-library")
    assert result.exit_code == 1
    assert "2, 4 and 8 bits only" in result.stdout.replace("\n", " ")


def test_recipes() -> None:
    listed = run("recipes").stdout
    plain = run_json("recipes")
    assert "uniform" in plain
    assert all(name in listed for name in plain)
    assert Recipe.from_dict(yaml.safe_load(run("recipes", "uniform").stdout)) == Recipe.load("uniform")
    wrong = run("recipes", "unifrom")
    assert wrong.exit_code == 1
    assert "uniform" in wrong.stderr


def test_export_shows_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from onnxq.export.result import ExportedGraph, ExportResult, OutputDifference

    graph = ExportedGraph(
        tmp_path / "model.onnx",
        21,
        480,
        {"MatMul": 72, "Add": 60},
        90_000_000,
        ("a <- b",),
        (OutputDifference("y", 1e-6, 1e-7),),
    )

    def pretend(source: Path, out_dir: Path, **options: Any) -> ExportResult:
        options["progress"]("exporting")
        assert (options["task"], options["opset"], options["force"]) == ("feature-extraction", 20, True)
        return ExportResult(out_dir, options["task"], (graph,), ("tokenizer.json",), 12.5)

    monkeypatch.setattr("onnxq.export.export", pretend)
    words = ("export", tmp_path, tmp_path / "out", "--task", "feature-extraction", "--opset", 20, "--force")
    result = run(*words)
    assert result.exit_code == 0, result.stderr
    assert all(text in result.stdout for text in ("model.onnx", "90.0 MB", "1.0e-06", "MatMul 72", "tokenizer.json"))
    assert "exporting" in result.stderr
    assert run_json(*words)["graphs"][0]["nodes"] == 480


def test_plain_data_holds_what_json_can(tmp_path: Path) -> None:
    given = {"a": (float("nan"), 1.5), "b": tmp_path, "c": Verdict.FAST, 1: {2}}
    assert as_data(given) == {"a": [None, 1.5], "b": str(tmp_path), "c": "fast", "1": [2]}


def test_our_errors_have_one_base() -> None:
    with pytest.raises(OnnxqError):
        adjusted_recipe("nothing", width=None, group_size=None, redundancy=None, target=None, seed=None)
