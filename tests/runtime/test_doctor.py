"""Each cliff of ONNX Runtime that is known, on the smallest model that falls off it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import onnxq
from onnxq.errors import LibraryError, ModelError
from onnxq.recipe import uniform_recipe
from onnxq.runtime.doctor import Diagnosis, Finding, diagnose, has_own_nodes
from onnxq.runtime.environment import TOLERANCE, check_environment
from onnxq.runtime.library import LIBRARY_VARIABLE
from onnxq.runtime.rules import Verdict
from tests.graph.models import merged_decoder, save
from tests.runtime import models


def only(found: Diagnosis) -> Finding:
    assert not found.broken
    (finding,) = found.findings
    return finding


@pytest.mark.parametrize(
    ("build", "verdict", "what", "cure"),
    [
        (models.fused, Verdict.FAST, "4-bit product", ""),
        (models.transposed, Verdict.SLOW, "transposed behind", "--target stock"),
        (models.float8, Verdict.SLOW, "float8e4m3fn", "session.disable_quant_qdq"),
        (models.dequantized_table, Verdict.SLOW, "not only the rows looked up", "onnxq quantize"),
        (models.float8_cast, Verdict.FOLDED, "expanded to float32", "onnxq quantize"),
        (models.int8_dynamic, Verdict.FAST, "int8 product", ""),
        (models.float_product, Verdict.FLOAT, "float32 weight", ""),
    ],
)
def test_forms(build: Callable[[Path], Path], verdict: Verdict, what: str, cure: str, tmp_path: Path) -> None:
    finding = only(diagnose(build(tmp_path / "m.onnx"), library=False))
    assert finding.verdict is verdict
    assert what in finding.what
    assert cure in finding.cure
    assert bool(finding.cure) == (verdict in (Verdict.SLOW, Verdict.FOLDED))


def test_folding_tells_the_memory_it_costs(tmp_path: Path) -> None:
    finding = only(diagnose(models.float8_cast(tmp_path / "m.onnx"), library=False))
    assert finding.file_bytes == models.N * models.K
    assert finding.memory_bytes == 4 * models.N * models.K
    assert finding.weight == "codes"


def test_one_dequantize_for_two_products_is_slow_at_both(tmp_path: Path) -> None:
    found = diagnose(models.shared(tmp_path / "m.onnx"), library=False)
    assert found.counts["slow"] == 2
    assert all("share it" in finding.what for finding in found.findings)


@pytest.mark.parametrize(
    ("bits", "block", "level", "float_zeros", "verdict", "what"),
    [
        (2, 32, 4, False, Verdict.FAST, "2-bit"),
        (4, 32, None, False, Verdict.FAST, "float32 activations"),
        (8, 32, 4, False, Verdict.FAST, "int8 activations"),
        (2, 32, None, False, Verdict.SLOW, "accuracy level 0"),
        (8, 32, 0, False, Verdict.SLOW, "accuracy level 0"),
        (8, 32, 1, False, Verdict.SLOW, "accuracy level 1"),
        (2, 16, 4, False, Verdict.SLOW, "blocks of 16"),
        (2, 256, 4, False, Verdict.SLOW, "blocks of 256"),
        (2, 32, 4, True, Verdict.SLOW, "float zero points"),
        (4, 32, 4, True, Verdict.SLOW, "float zero points"),
    ],
)
def test_products(
    bits: int, block: int, level: int | None, float_zeros: bool, verdict: Verdict, what: str, tmp_path: Path
) -> None:
    path = models.nbits(tmp_path / "m.onnx", bits=bits, block=block, level=level, float_zeros=float_zeros)
    finding = only(diagnose(path, library=False))
    assert (finding.verdict, finding.node) == (verdict, "fc")
    assert what in finding.what


def test_a_width_that_is_refused_is_broken_with_a_cure(tmp_path: Path) -> None:
    found = diagnose(models.nbits(tmp_path / "m.onnx", bits=3), library=False)
    assert not found.findings
    assert "2, 4 and 8 bits only" in found.broken


@pytest.fixture(scope="module")
def quantised(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    recipe = uniform_recipe(3, 32)
    onnxq.quantize(models.encoder(folder / "float.onnx"), folder / "small.onnx", recipe=recipe)
    return folder / "small.onnx"


def test_our_nodes_fold_to_bytes_on_stock(quantised: Path) -> None:
    found = diagnose(quantised, library=False)
    assert has_own_nodes(quantised)
    assert {finding.verdict for finding in found.findings} == {Verdict.FOLDED}
    assert all("library" in finding.cure for finding in found.findings)
    assert {"embed.weight", "layer.0.up.weight", "layer.1.down.weight"} <= {f.weight for f in found.findings}
    assert found.memory_bytes > found.file_bytes


def test_our_nodes_run_on_the_kernel(quantised: Path, library: Path) -> None:
    found = diagnose(quantised, library=True)
    assert found.counts == {"fast": 5, "slow": 0, "folded": 0, "float": 0}
    assert {finding.op for finding in found.findings} == {"LowBitMatMul", "LowBitGather"}
    assert all(finding.memory_bytes <= finding.file_bytes + 4 * 64 + 4 for finding in found.findings)  # a bias


def test_a_model_that_lost_its_functions_needs_the_library(quantised: Path, tmp_path: Path) -> None:
    bare = models.without_functions(quantised, tmp_path / "bare.onnx")
    assert "lost its function bodies" in diagnose(bare, library=False).broken


def test_nodes_in_subgraphs_are_found(tmp_path: Path) -> None:
    path = save(merged_decoder(rows=64, width=32), tmp_path / "m.onnx")
    assert diagnose(path, library=False).counts["float"] >= 4


def test_nodes_of_branches_are_told_apart_on_stock(tmp_path: Path) -> None:
    path = save(merged_decoder(rows=128, width=64), tmp_path / "float.onnx")
    onnxq.quantize(path, tmp_path / "small.onnx", recipe=uniform_recipe(3, 32))
    found = diagnose(tmp_path / "small.onnx", library=False)
    assert found.counts["folded"] == len(found.findings) == 6
    assert [finding.weight for finding in found.findings].count("decoder.q_proj") == 2


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = models.fused(tmp_path / "m.onnx")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    diagnose(path, library=False)
    assert not list(temporary.iterdir())


def test_a_file_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError, match=r"m\.onnx"):
        diagnose(tmp_path / "m.onnx", library=False)


def test_asking_for_a_missing_library_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(LibraryError):
        diagnose(models.fused(tmp_path / "m.onnx"), library=True)


def test_the_environment_without_a_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIBRARY_VARIABLE, str(tmp_path / "none.so"))
    found = check_environment()
    assert not found.works
    assert found.library is None
    assert LIBRARY_VARIABLE in found.problem


def test_a_file_that_is_no_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "fake.so"
    fake.write_bytes(b"not a library")
    monkeypatch.setenv(LIBRARY_VARIABLE, str(fake))
    assert str(fake) in check_environment().problem


def test_the_kernel_computes_what_numpy_does(library: Path) -> None:
    found = check_environment()
    assert found.test_error is not None
    assert found.test_error <= TOLERANCE
    assert found.works
    assert found.library is not None
    assert found.library["isa"] in found.library["available"]
