"""The demonstration's data: pairs of two views of one hidden vector, and texts to choose from."""

from __future__ import annotations

from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from kdcore import Data, InputError

Count = Annotated[int, Field(gt=0)]
HIDDEN, SIZE = 6, 20


class Candidates:
    """Image i and the texts to choose from: text i first and ``negatives`` others of this split; without, all of them.

    Items: ``image`` [20], ``text`` [F+1,20] with the match at ``target``: 0 in training, i where all texts stand in
    their order. The negatives are drawn anew each time that an item is shown.
    """

    def __init__(self, ids: Tensor, image: Tensor, text: Tensor, negatives: int = 0) -> None:
        self.ids, self.image, self.text, self.negatives = ids, image, text, negatives
        if negatives:
            self.augment = self._drawn

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        chosen = (
            torch.arange(len(self)) if not self.negatives else self._others(index, np.arange(self.negatives))
        )
        target = 0 if self.negatives else index
        return {
            "id": int(self.ids[index]),
            "row": index,
            "image": self.image[index],
            "text": self.text[chosen],
        } | {"target": target}

    def _others(self, index: int, places: Any) -> Tensor:
        """Text ``index`` and, of the others in their order, those at ``places``."""
        places = torch.as_tensor(places)
        return torch.cat([torch.tensor([index]), places + (places >= index)])

    def _drawn(self, item: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        places = rng.choice(len(self) - 1, self.negatives, replace=False)
        return {**item, "text": self.text[self._others(item["row"], places)]}


def pairs(
    *,
    train: Count = 400,
    negatives: Count = 31,
    noise: Annotated[float, Field(ge=0)] = 0.35,
    held_out: Count = 100,
    split_seed: int = 0,
) -> Data:
    """Synthetic image-text pairs: x = tanh(z A / 2) + noise, t = tanh(z B / 2) + noise, z in R^6, x and t in R^20.

    ``train`` pairs, each shown with ``negatives`` random texts; val and test have ``held_out`` pairs each, and every
    image is to find its text among all of them. ``split_seed`` draws everything.
    """
    if negatives >= train:
        raise InputError("data.args.negatives", "more than there are other texts", given=negatives)
    rng = np.random.default_rng((split_seed, 2207))
    count = train + 2 * held_out
    z = rng.standard_normal((count, HIDDEN))

    def view() -> Tensor:
        seen = np.tanh(z @ rng.standard_normal((HIDDEN, SIZE)) / 2)
        return torch.tensor(seen + noise * rng.standard_normal(seen.shape), dtype=torch.float32)

    image, text = view(), view()
    ids = torch.arange(count).split([train, held_out, held_out])
    first, second, third = (
        Candidates(part, image[part], text[part], negatives * (index == 0)) for index, part in enumerate(ids)
    )
    return Data(first, second, third, description=f"{train} synthetic pairs, noise {noise}")
