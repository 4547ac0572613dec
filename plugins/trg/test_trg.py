"""TRG in a run: the shared draw, grids, the temperature's schedule, the projector; the probe and the data."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from kd_plugin_trg.data import counts, long_tailed
from kd_plugin_trg.loss import TRGLoss, temperature_at
from kd_plugin_trg.probe import context_correlation, overlap
from kd_plugin_trg.tokens import draw, same_grid, taken, tokens_of
from torch import Tensor

import kdcore
from kdcore import Batch, InputError, Outputs
from kdcore.checkpoint import load_tensors
from kdcore.recipe import parse
from kdcore.testing.toys import Home, tree


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ---- tokens ---------------------------------------------------------------------------------------------


def splitmix64(x: int) -> int:
    """The published finaliser, on unsigned integers."""
    full = (1 << 64) - 1
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & full
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & full
    return x ^ (x >> 31)


def test_the_mixing_is_splitmix64() -> None:
    from kd_plugin_trg.tokens import _mixed

    numbers = [0, 1, 12345, -1, -(2**63), 2**62 + 7]
    expected = [splitmix64(n % 2**64) for n in numbers]
    assert [int(v) % 2**64 for v in _mixed(torch.tensor(numbers))] == expected


def test_the_draw_belongs_to_sample_and_seed() -> None:
    ids = torch.arange(1000, 1200)
    places = draw(ids, 4, 16, seed=7)
    assert places.shape == (200, 4)
    assert all(len(set(row)) == 4 for row in places.tolist())  # no place twice
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(ids[order], 4, 16, 7), places[order])
    assert torch.equal(draw(ids[:3], 4, 16, 7), places[:3])
    assert (draw(ids, 4, 16, 8) == places).float().mean() < 0.15
    shares = draw(torch.arange(8000), 4, 16, 1).flatten().bincount(minlength=16) / 32000
    assert (shares - 1 / 16).abs().max() < 0.006  # four standard deviations
    assert draw(ids, 99, 16, 7).sort(1).values.tolist() == [list(range(16))] * 200


def test_both_networks_are_asked_at_the_same_places() -> None:
    s, t = normal(0, 3, 16, 2), normal(1, 3, 16, 5)
    places = draw(torch.tensor([5, 6, 7]), 2, 16, 0)
    a, b = taken(s, places), taken(t, places)
    for row, (image, place) in enumerate((i, int(p)) for i in range(3) for p in places[i]):
        assert torch.equal(a[row], s[image, place])
        assert torch.equal(b[row], t[image, place])


def test_maps_and_transformers_give_tokens() -> None:
    x = normal(2, 2, 3, 4, 5)
    assert torch.equal(tokens_of(x)[1, 7], x[1, :, 1, 2])
    patches = normal(3, 2, 17, 6)
    assert torch.equal(tokens_of(patches, skip=1), patches[:, 1:])
    for bad in (normal(4, 2, 6), normal(4, 2, 1, 6)):
        with pytest.raises(InputError, match="gives no tokens"):
            tokens_of(bad, skip=1)


def test_the_larger_grid_is_averaged() -> None:
    large, small = normal(5, 2, 3, 8, 8), normal(6, 2, 7, 4, 4)
    a, b = same_grid(tokens_of(large), tokens_of(small))
    torch.testing.assert_close(a, tokens_of(F.avg_pool2d(large, 2)))
    assert torch.equal(b, tokens_of(small))
    b, a = same_grid(tokens_of(small), tokens_of(large))
    torch.testing.assert_close(a, tokens_of(F.avg_pool2d(large, 2)))
    with pytest.raises(InputError, match="not square"):
        same_grid(normal(7, 1, 12, 2), normal(7, 1, 16, 2))


# ---- the loss in a run ------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Home:
    """A toy run with TRG between a student of 2 x 4 x 4 x 4 maps and a teacher."""
    reads = {side: {"tokens": "body.0"} for side in ("student", "teacher")}
    recipe = {**tree("image"), "loss": [{"use": "trg", "reads": reads, "teacher": "main", "k": 3, "m": 4}]}
    found = Home(parse(recipe), tmp_path)
    found.at("loss.0")
    return found


def asked(home: Home, ids: Tensor, order: Tensor | None = None, **params: Any) -> dict[str, Tensor]:
    """The terms for fixed random maps of these samples."""
    loss = home.make("loss", "trg", {"k": 3, **params})
    order = torch.arange(len(ids)) if order is None else order
    sides = [Outputs(tensors={"tokens": normal(seed, len(ids), 4, 4, 4)[order]}) for seed in (10, 11)]
    found: dict[str, Tensor] = loss(*sides, Batch({"id": ids[order]}))
    return found


def test_another_order_of_the_batch_gives_the_same_values(home: Home) -> None:
    ids, order = torch.arange(6), torch.tensor([3, 0, 5, 1, 4, 2])
    home.run.step = 4
    first, second = asked(home, ids), asked(home, ids, order)
    assert list(first) == ["inner", "global", "local"]
    for name, value in first.items():
        assert value.shape == (6,)
        torch.testing.assert_close(second[name], value[order], rtol=1e-4, atol=1e-6)
    home.run.step = 5  # another draw: the terms of tokens change, the context of whole images does not
    third = asked(home, ids)
    assert torch.equal(third["inner"], first["inner"])
    assert not torch.allclose(third["local"], first["local"])


def test_weights_multiply_and_zero_leaves_a_term_out(home: Home) -> None:
    ids = torch.arange(6)
    one, two = asked(home, ids), asked(home, ids, alpha=20.0, beta=2.0, gamma=0.2)
    for name in one:
        torch.testing.assert_close(two[name], 2 * one[name])
    assert list(asked(home, ids, gamma=0.0)) == ["inner", "local"]
    loss = home.make("loss", "trg", {"gamma": 0.0})
    assert not list(loss.parameters())


def test_the_temperature_falls_with_the_run(home: Home) -> None:
    loss = home.make("loss", "trg", {})
    assert isinstance(loss, TRGLoss)
    home.run.total_steps, seen = 10, []
    for home.run.step in (0, 5, 10):
        seen.append(loss.tau)
    assert seen == pytest.approx([1.0, 0.55, 0.1])
    assert [temperature_at(p, 1.0, 0.1, "cosine") for p in (0.0, 0.25, 0.5, 1.0)] == pytest.approx(
        [1.0, 1 - 0.9 * 0.14644661, 0.55, 0.1]
    )


def test_of_unit_length_unless_told_otherwise(home: Home) -> None:
    ids = torch.arange(6)
    assert asked(home, ids, normalise=False)["local"].mean() < asked(home, ids)["local"].mean()


def test_the_recipe_trains_the_projector_and_ships_the_plain_student(tmp_path: Path) -> None:
    short = ["train.epochs=1", "teacher.main.train.epochs=1", "teacher.main.args.width=4"]
    result = kdcore.run("trg:digits", out=tmp_path / "run", overrides=short)
    terms = [t["term"] for t in result.results["student"]["guards"]["terms"]]
    assert terms == ["trg.inner", "trg.global", "trg.local", "kd", "task"]
    shipped = load_tensors(result.student, "test")
    plain = kdcore.build("student", "module", model="kdcore.zoo:conv_net", args={"width": 6})
    assert shipped.keys() == plain.parameters_to_ship().keys()
    probe = result.results["probes"]["trg"]
    assert probe["accuracy"] == pytest.approx(result.metrics["accuracy"])
    assert 0 < probe["neighbour_overlap"] < 1


# ---- the probe's measures and the data --------------------------------------------------------------------


def test_overlap_and_context_correlation() -> None:
    s, t = normal(12, 400, 6), normal(13, 400, 9)
    assert overlap(s, 3 * s, k=8) == 1
    assert overlap(s, t, k=8) == pytest.approx(8 / 399, abs=0.012)  # what chance shares
    images = normal(14, 5, 16, 4)
    assert context_correlation(images, images) == pytest.approx(1)
    assert abs(context_correlation(normal(15, 200, 16, 4), normal(16, 200, 16, 4))) < 0.7
    assert context_correlation(images, images + 0.1 * normal(17, 5, 16, 4)) > 0.9


def test_the_classes_get_rarer() -> None:
    wanted = counts(90, 9)
    assert (wanted[0], wanted[-1]) == (90, 9)
    assert all(a >= b for a, b in itertools.pairwise(wanted))
    data, whole = long_tailed(), long_tailed(balanced=True)
    assert data.train.values["target"].bincount().tolist() == wanted
    assert set(data.train.values["id"].tolist()) < set(whole.train.values["id"].tolist())
    assert torch.equal(data.test.values["id"], whole.test.values["id"])
    splits = [whole.train, whole.val, whole.test]
    assert sorted(torch.cat([s.values["id"] for s in splits]).tolist()) == list(range(1797))
    raw = data.raw([3])["input"] if data.raw else None
    assert raw is not None
    assert raw.shape == (1, 8, 8)
