"""Four domains of text that ship with Python, as blocks of tokens; and a small language model for them."""

from __future__ import annotations

import ast
import codecs
import functools
import pkgutil
import re
import sysconfig
import unicodedata
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn

from kdcore import Data, InputError
from kdcore.datasets import TensorSet

DOMAINS = ("reference", "code", "names", "tables")
SHARES = (0.70, 0.20, 0.05, 0.05)  # of the training blocks: a corpus in which most is prose
CODE: tuple[str, ...] = (
    "argparse",
    "configparser",
    "difflib",
    "ftplib",
    "gzip",
    "heapq",
    "imaplib",
    "inspect",
)
CODE += (
    "locale",
    "mailbox",
    "nntplib",
    "optparse",
    "pdb",
    "pickle",
    "platform",
    "shutil",
    "smtplib",
    "statistics",
)
CODE += ("tarfile", "zipfile")
Count = Annotated[int, Field(gt=0)]


def domains(
    *,
    train: Count = 1600,
    balanced: bool = False,
    val: Count = 40,
    test: Count = 60,
    vocab: Annotated[int, Field(ge=300)] = 400,
    block: Annotated[int, Field(ge=2)] = 48,
) -> Data:
    """Blocks of ``block`` tokens of DOMAINS: ``input`` and ``target`` (the next tokens) int64 [block], ``domain`` int64.

    Python's language reference, the code of modules of its library without comments and docstrings, the names of
    Unicode characters, and the byte tables of its encodings. About ``train`` blocks, in SHARES of the domains (or
    the same from each with ``balanced``); ``val`` and ``test`` blocks of each domain. Consecutive pieces of a domain
    are dealt to the splits, so none shares text with another. A byte-level BPE is trained on the training pieces.
    """
    pieces = {name: dealt(text_of(name)) for name in DOMAINS}
    coder = byte_pair([body for parts in pieces.values() for body in parts["train"]], vocab)
    shares = [1 / len(DOMAINS)] * len(DOMAINS) if balanced else SHARES
    wanted = {"train": [round(train * share) for share in shares], "val": [val] * 4, "test": [test] * 4}
    sets = {}
    for part, counts in wanted.items():
        rows = [_blocks(coder, pieces[name][part], block, n) for name, n in zip(DOMAINS, counts, strict=True)]
        sets[part] = _tensors(rows, part)
    return Data(
        train=sets["train"],
        val=sets["val"],
        test=sets["test"],
        classes=coder.get_vocab_size(),
        description=f"{', '.join(DOMAINS)}: {len(sets['train'])} training blocks of {block} tokens",
        licence="PSF-2.0, Unicode-3.0",
    )


@functools.cache
def text_of(domain: str) -> str:
    """The whole text of a domain, as this Python has it."""
    if domain == "reference":
        from pydoc_data.topics import topics

        passages = (p for name in sorted(topics) for p in re.split(r"\n\s*\n", topics[name]))
        return "\n\n".join(
            dict.fromkeys(" ".join(p.split()) for p in passages)
        )  # several topics share passages
    if domain == "code":
        return "\n".join(_bare(name) for name in CODE)
    if domain == "names":
        found = ((c, unicodedata.name(chr(c), "")) for c in range(0x20, 0x3000))
        return "\n".join(f"U+{c:04X} {name}" for c, name in found if name)
    return "\n".join(_table(name) for name in _charmaps())


def _bare(module: str) -> str:
    """A module's code without comments and docstrings."""
    tree = ast.parse((Path(sysconfig.get_paths()["stdlib"]) / f"{module}.py").read_text("utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr):
            first = body[0].value
            if isinstance(first, ast.Constant) and isinstance(first.value, str):
                body[0] = ast.Pass()
    return ast.unparse(tree)


def _charmaps() -> list[str]:
    """The 8-bit encodings that Python has a table of."""
    import encodings

    names = [module.name for module in pkgutil.iter_modules(encodings.__path__)]
    return sorted(name for name in names if re.fullmatch(r"cp\d+|iso8859_\d+|koi8_\w|mac_\w+", name))


def _table(name: str) -> str:
    """Byte, code point and character name of the upper half of an encoding."""
    lines = [name]
    for byte in range(0x80, 0x100):
        try:
            character = codecs.decode(bytes([byte]), name)
        except (UnicodeDecodeError, LookupError):
            continue
        lines.append(f"0x{byte:02X} 0x{ord(character):04X}")
    return "\n".join(lines)


def dealt(body: str, size: int = 2000) -> dict[str, list[str]]:
    """Pieces of ``size`` characters by split: of every ten in a row, one val, two test, the rest train."""
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for number, start in enumerate(range(0, len(body), size)):
        place = number % 10
        part = "val" if place == 4 else "test" if place in (2, 7) else "train"
        parts[part].append(body[start : start + size])
    return parts


@functools.cache
def _trained(texts: tuple[str, ...], vocab: int) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab, initial_alphabet=alphabet, show_progress=False)
    coder.train_from_iterator(texts, trainer)
    written: str = coder.to_str()
    return written


def byte_pair(texts: list[str], vocab: int) -> Any:
    """A byte-level BPE trained on ``texts``; the same texts give the same one."""
    try:
        from tokenizers import Tokenizer
    except ImportError:
        hint = 'pip install "kd-plugin-ddk[demo]"'
        raise InputError("data.source", "the package tokenizers is not installed", hint=hint) from None
    return Tokenizer.from_str(_trained(tuple(texts), vocab))


def _blocks(coder: Any, pieces: list[str], block: int, count: int) -> Tensor:
    """int64 [count, block + 1]: the first blocks of a domain's pieces, one token more than the model is given."""
    rows: list[list[int]] = []
    for piece in pieces:
        ids = coder.encode(piece).ids
        rows += [ids[at : at + block + 1] for at in range(0, len(ids) - block, block)]
        if len(rows) >= count:
            return torch.tensor(rows[:count])
    raise InputError("data.args", "a domain has fewer blocks", given=count, allowed=f"up to {len(rows)}")


def _tensors(rows: list[Tensor], part: str) -> TensorSet:
    """All domains' blocks as one set, mixed by a fixed permutation."""
    domain = torch.cat([torch.full((len(each),), i) for i, each in enumerate(rows)])
    order = torch.tensor(np.random.default_rng((2407, len(part))).permutation(len(domain)))
    ids, domain = torch.cat(rows)[order], domain[order]
    return TensorSet(torch.arange(len(ids)), input=ids[:, :-1], target=ids[:, 1:], domain=domain)


class ConvLM(nn.Module):
    """Tokens int64 [B,L] -> logits [B,L,V], each from its token and the ``reach - 1`` before it, in every layer."""

    def __init__(self, vocab: int, width: int, layers: int, reach: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.body = nn.ModuleList(nn.Conv1d(width, width, reach) for _ in range(layers))
        self.head = nn.Linear(width, vocab)
        self.reach = reach

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).transpose(1, 2)
        for layer in self.body:
            x = x + layer(nn.functional.pad(x, (self.reach - 1, 0))).relu()
        return self.head(x.transpose(1, 2))  # type: ignore[no-any-return]


def conv_lm(*, vocab: Count = 400, width: Count = 32, layers: Count = 1, reach: Count = 3) -> ConvLM:
    """A small causal language model of convolutions."""
    return ConvLM(vocab, width, layers, reach)
