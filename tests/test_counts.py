"""What a term is divided by: samples, or the positions that count, of the global batch."""

from __future__ import annotations

import pytest
import torch

from kdcore import Batch, InputError, Outputs, Student
from kdcore.counts import Counts, mask_of

CPU = torch.device("cpu")


class Silent(Student):
    """What counts is told by the batch alone."""

    def forward(self, batch: Batch) -> Outputs:
        return Outputs()


def pixels() -> Batch:
    """Four targets of 2x3 pixels, of which 0, 1, 2 and 6 are labelled."""
    target = torch.full((4, 6), -100)
    for row, labelled in enumerate((0, 1, 2, 6)):
        target[row, :labelled] = 1
    return Batch({"id": torch.arange(4), "target": target.view(4, 2, 3)})


@pytest.mark.parametrize("chunks", [1, 2, 4])
def test_a_term_of_pixels_is_a_mean_over_the_labelled_ones_of_all_micro_batches(chunks: int) -> None:
    batch, term = pixels(), torch.arange(24.0).view(4, 2, 3)
    counts = Counts.of(batch, Silent(), CPU)
    parts = batch.chunks(chunks)
    shares = [counts.share(term[part["id"]], "main", Outputs(), part) for part in parts]
    assert sum(shares).item() == pytest.approx((6 + 12 + 13 + sum(range(18, 24))) / 9)


def test_the_models_own_word_on_what_counts_comes_first() -> None:
    batch = Batch({"id": torch.arange(1), "mask": torch.ones(1, 3), "target": torch.tensor([[1, 1, -100]])})
    term, mask = torch.zeros(1, 3), torch.tensor([[False, True, False]])
    assert torch.equal(mask_of(term, Outputs(mask=mask), batch), mask)
    assert mask_of(term, Outputs(target=torch.tensor([[-100, -100, 2]])), batch).tolist() == [[0, 0, 1]]
    assert mask_of(term, Outputs(), batch).tolist() == [[1, 1, 1]]
    del batch["mask"]
    assert mask_of(term, Outputs(), batch).tolist() == [[1, 1, 0]]
    assert mask_of(torch.zeros(1, 5), Outputs(), batch) is None  # of other positions than the target's


def test_a_term_of_other_positions_than_the_mask_is_refused() -> None:
    with pytest.raises(InputError, match=r"a term \(2, 4\) does not fit the mask \(2, 3\)"):
        mask_of(torch.zeros(2, 4), Outputs(mask=torch.ones(2, 3)), Batch())
