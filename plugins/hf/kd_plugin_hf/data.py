"""Text for language models in blocks of tokens: Python's own documentation, or a folder of text files."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from kdcore.datasets import Share, TensorSet
from kdcore.errors import InputError
from kdcore.types import Data

PAD, END = "<pad>", "<end>"
LEAST_VOCAB = 258  # every byte, PAD and END
PASSAGE = 60  # characters from which a passage counts as text of its own rather than a heading


def text(
    *,
    folder: str | None = None,
    tokenizer: str | None = None,
    vocab: Annotated[int, Field(ge=LEAST_VOCAB)] = 512,
    block: Annotated[int, Field(ge=2)] = 128,
    val: Share = 0.1,
    test: Share = 0.2,
    split_seed: int = 0,
) -> Data:
    """Blocks of tokens: ``input_ids`` and ``target`` int64 [block], ``attention_mask`` int64 [block].

    The text is the language reference that Python ships (``pydoc_data.topics``), or the ``.txt`` files of
    ``folder``, each one document. Documents are divided between train, val and test (shares of characters)
    by ``split_seed``; a passage that stands in several is kept once, so no split has text of another.
    ``tokenizer`` names a tokenizer.json; without one a byte-level BPE of ``vocab`` entries is trained on the
    training documents. A document ends with END; its last block is padded, with target -100 there. ``target``
    is not shifted: the model's adapter does that. The id is the block's number over all documents.
    """
    documents = unique_passages(python_documents() if folder is None else text_files(Path(folder)))
    parts = split_documents({name: len(body) for name, body in documents.items()}, (val, test), split_seed)
    train = [documents[name] for name in parts[0]]
    coder = byte_pair(train, vocab) if tokenizer is None else load_tokenizer(tokenizer)
    rows = {name: blocks(encode(coder, body), block) for name, body in documents.items()}
    first = dict(zip(rows, np.cumsum([0, *map(len, rows.values())]), strict=False))
    sets = [
        _tensors([(first[n] + i, row) for n in part for i, row in enumerate(rows[n])], block, coder)
        for part in parts
    ]
    origin = f"text files of {folder}" if folder else f"documentation of Python {platform.python_version()}"
    return Data(
        train=sets[0],
        val=sets[1],
        test=sets[2],
        classes=coder.get_vocab_size(),
        description=f"{origin}: {len(documents)} documents, {len(sets[0])} training blocks of {block} tokens",
        licence="" if folder else "PSF-2.0",
        tokenizer=coder.to_str(),
    )


def python_documents() -> dict[str, str]:
    """Topic -> text of Python's language reference, as ``help()`` shows it; it comes with the interpreter."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def text_files(folder: Path) -> dict[str, str]:
    found = {file.name: file.read_text("utf-8") for file in sorted(folder.glob("*.txt"))}
    if len(found) < 3:
        raise InputError(
            "data.args.folder", "needs three or more .txt files, one a document", given=str(folder)
        )
    return found


def unique_passages(documents: Mapping[str, str]) -> dict[str, str]:
    """The documents, each passage (text between blank lines, spacing aside) only where it first stands."""
    seen: set[str] = set()
    kept = {}
    for name, body in documents.items():
        passages = []
        for passage in re.split(r"\n\s*\n", body):
            key = " ".join(passage.split())
            if key not in seen:
                passages.append(passage.strip("\n"))
            if len(key) >= PASSAGE:
                seen.add(key)
        if any(len(" ".join(p.split())) >= PASSAGE for p in passages):
            kept[name] = "\n\n".join(passages)
    return kept


def split_documents(
    sizes: Mapping[str, int], shares: tuple[float, float], seed: int
) -> tuple[list[str], list[str], list[str]]:
    """Names for train, val and test: in an order drawn from ``seed``, each goes where its size still fits."""
    whole, (val, test) = sum(sizes.values()), shares
    left = {"test": test * whole, "val": val * whole}
    parts: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    names = list(sizes)
    for index in np.random.default_rng(seed).permutation(len(names)):
        name = names[index]
        part = next((p for p in left if sizes[name] <= left[p]), "train")
        parts[part].append(name)
        if part in left:
            left[part] -= sizes[name]
    return parts["train"], parts["val"], parts["test"]


def byte_pair(texts: Iterable[str], vocab: int) -> Tokenizer:
    """A byte-level BPE trained on ``texts``; the same texts give the same tokenizer. Reads any text."""
    coder = Tokenizer(models.BPE())
    coder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    coder.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[PAD, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    coder.train_from_iterator(texts, trainer)
    return coder


def load_tokenizer(path: str) -> Tokenizer:
    try:
        return Tokenizer.from_file(path)
    except Exception as error:  # the library raises bare Exception
        raise InputError(
            "data.args.tokenizer", f"no tokenizer can be read here: {error}", given=path
        ) from None


def encode(coder: Tokenizer, body: str) -> list[int]:
    """The tokens of a document, with END where the tokenizer has it."""
    ids: list[int] = coder.encode(body, add_special_tokens=False).ids
    end = coder.token_to_id(END)
    return ids if end is None else [*ids, end]


def blocks(ids: Sequence[int], size: int) -> list[Sequence[int]]:
    """Consecutive blocks of ``size`` tokens, the last as long as what is left; a lone token is dropped."""
    cut = [ids[start : start + size] for start in range(0, len(ids), size)]
    return [row for row in cut if len(row) > 1]


def _tensors(rows: Sequence[tuple[int, Sequence[int]]], block: int, coder: Tokenizer) -> TensorSet:
    ids = torch.full((len(rows), block), coder.token_to_id(PAD) or 0)
    mask = torch.zeros_like(ids)
    for place, (_, row) in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    number = torch.tensor([number for number, _ in rows], dtype=torch.int64)
    return TensorSet(number, input_ids=ids, attention_mask=mask, target=ids.masked_fill(mask == 0, -100))
