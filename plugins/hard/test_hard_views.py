"""The views against scipy, scikit-image and numpy; the distribution that they draw from against scipy.stats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from kd_plugin_hard.affine import Affine, affine
from kd_plugin_hard.colour import Colour, colour
from kd_plugin_hard.data import framed, shifted_digits
from kd_plugin_hard.generator import Generator
from kd_plugin_hard.views import Spread, View
from scipy import ndimage, stats
from skimage import transform
from torch import Tensor, nn

import kdcore
from kdcore import InputError

IMAGES = torch.from_numpy(np.random.RandomState(0).rand(2, 3, 9, 12))  # no square, all axes different


def moved(images: Tensor, fill: float = 0.0, **given: Any) -> Tensor:
    """``affine`` with everything that is not given at no change; numbers for the whole batch."""
    one, none = images.new_ones(len(images)), images.new_zeros(len(images))
    wanted = {"shift": images.new_zeros(len(images), 2), "rotation": none, "scale": one, "shear": none}
    wanted |= {k: v if isinstance(v, Tensor) else v * one for k, v in given.items()}
    return affine(images, fill=fill, **wanted)


def rgb(images: Tensor, **given: float) -> Tensor:
    one = images.new_ones(len(images))
    wanted = {"brightness": 0.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.0, **given}
    return colour(images, **{k: v * one for k, v in wanted.items()})


def distorting(view: View) -> View:
    """With other weights than the first ones, as if it had been trained."""
    with torch.no_grad():
        for i, parameter in enumerate(view.parameters()):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return view


VIEWS: dict[str, Any] = {
    "affine": lambda: Affine(),
    "colour": lambda: Colour(),
    "generator": lambda: Generator(channels=3),
}


# ---- affine -----------------------------------------------------------------------------------------


def test_no_change_is_the_image() -> None:
    torch.testing.assert_close(moved(IMAGES), IMAGES, rtol=0, atol=1e-12)


@pytest.mark.parametrize("right, down", [(2, 0), (0, -3), (-1, 2)])
def test_whole_pixels_are_moved_as_they_are(right: int, down: int) -> None:
    """scipy.ndimage.shift, whose order is rows, columns."""
    shift = torch.tensor([[right / 12, down / 9]], dtype=torch.float64).expand(2, 2)
    expected = ndimage.shift(IMAGES.numpy(), (0, 0, down, right), order=1, cval=0.25)
    torch.testing.assert_close(
        moved(IMAGES, 0.25, shift=shift), torch.from_numpy(expected), rtol=0, atol=1e-9
    )


def test_a_quarter_turn_of_a_square() -> None:
    """From the x axis towards the y axis, which points down: clockwise, so rot90 with k = -1."""
    square = IMAGES[..., :9]
    torch.testing.assert_close(moved(square, rotation=math.pi / 2), torch.rot90(square, -1, (2, 3)))


def test_everything_at_once_as_scikit_image_has_it() -> None:
    """warp by x' = R S Z x + shift about the centre, in pixels; inside, where borders do not matter."""
    angle, scale, shear, shift = 0.4, 1.3, 0.25, (1.5, -0.75)
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = np.eye(3)
    matrix[:2, :2] = turn @ np.array([[1, shear], [0, 1]]) * scale
    middle = np.array([5.5, 4.0])
    matrix[:2, 2] = middle + shift - matrix[:2, :2] @ middle
    smooth = ndimage.gaussian_filter(IMAGES.numpy(), (0, 0, 1, 1))
    one = torch.tensor([[shift[0] / 12, shift[1] / 9]], dtype=torch.float64).expand(2, 2)
    got = moved(torch.from_numpy(smooth), shift=one, rotation=angle, scale=scale, shear=shear)
    for image, expected in zip(got.flatten(0, 1).numpy(), smooth.reshape(-1, 9, 12), strict=True):
        wanted = transform.warp(expected, transform.AffineTransform(matrix).inverse, order=1, cval=0)
        ones = transform.warp(np.ones((9, 12)), transform.AffineTransform(matrix).inverse, order=1, cval=0)
        inside = ones > 0.999
        assert inside.sum() > 40
        np.testing.assert_allclose(image[inside], wanted[inside], atol=1e-6)


def test_affine_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    args = [0.1 * torch.randn(2, *shape, generator=generator).double() for shape in ((2,), (), (), ())]
    args[2] = args[2].exp()
    inputs = [IMAGES[..., :5, :6].clone(), *args]
    for each in inputs:
        each.requires_grad_()

    def function(images: Tensor, shift: Tensor, rotation: Tensor, scale: Tensor, shear: Tensor) -> Tensor:
        return affine(images, shift=shift, rotation=rotation, scale=scale, shear=shear)

    assert torch.autograd.gradcheck(function, inputs)


# ---- colour -----------------------------------------------------------------------------------------


def test_colour_in_numpy() -> None:
    x = IMAGES.numpy()
    mean = x.mean((1, 2, 3), keepdims=True)
    np.testing.assert_allclose(rgb(IMAGES, brightness=0.2).numpy(), x + 0.2)
    np.testing.assert_allclose(rgb(IMAGES, contrast=1.7).numpy(), (x - mean) * 1.7 + mean)
    grey = np.repeat(x.mean(1, keepdims=True), 3, 1)
    np.testing.assert_allclose(rgb(IMAGES, saturation=0.0).numpy(), grey)
    np.testing.assert_allclose(rgb(IMAGES, saturation=1.5).numpy(), 1.5 * x - 0.5 * grey)


def test_a_third_of_a_turn_of_hue_takes_red_to_green() -> None:
    torch.testing.assert_close(rgb(IMAGES, hue=2 * math.pi / 3), IMAGES.roll(1, 1))


def test_hue_is_a_rotation_about_the_grey_axis() -> None:
    """scipy's rotation matrix of a rotation vector along (1, 1, 1)."""
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_rotvec(0.7 * np.ones(3) / math.sqrt(3)).as_matrix()
    expected = np.einsum("ij,bjhw->bihw", turn, IMAGES.numpy())
    np.testing.assert_allclose(rgb(IMAGES, hue=0.7).numpy(), expected, atol=1e-12)


def test_grey_images_have_no_colour_to_change() -> None:
    grey = IMAGES[:, :1]
    assert torch.equal(rgb(grey, saturation=0.3, hue=1.0), rgb(grey))


# ---- what they draw ---------------------------------------------------------------------------------


def test_spread_one_is_uniform_over_the_bounds() -> None:
    spread = Spread({"a": 2.0, "none": 0.0, "b": 0.5}, 1.0)
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    drawn = {name: value.detach().numpy() for name, value in spread(z).items()}
    assert set(drawn) == {"a", "b"}
    assert stats.kstest(drawn["a"], stats.uniform(-2, 4).cdf).pvalue > 0.01
    assert stats.kstest(drawn["b"], stats.uniform(-0.5, 1).cdf).pvalue > 0.01
    assert stats.kstest(drawn["a"], stats.uniform(-2.2, 4.4).cdf).pvalue < 0.01


def test_a_learned_distribution_in_closed_form() -> None:
    """bound * (2 Phi(L z + mean) - 1), Phi the normal distribution function."""
    spread = Spread({"a": 2.0, "b": 0.5}, 0.1)
    weight, mean = np.array([[0.5, -1.0], [0.3, 2.0]]), np.array([0.2, -0.4])
    with torch.no_grad():
        spread.linear.weight.copy_(torch.from_numpy(weight))
        spread.linear.bias.copy_(torch.from_numpy(mean))
    assert spread.reach() == pytest.approx({"a": math.hypot(0.5, -1.0), "b": math.hypot(0.3, 2.0)})
    z = np.random.RandomState(1).standard_normal((5, 2))
    expected = np.array([2.0, 0.5]) * (2 * stats.norm.cdf(z @ weight.T + mean) - 1)
    got = spread(torch.from_numpy(z).float())
    np.testing.assert_allclose(torch.stack([got["a"], got["b"]], 1).detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("name", VIEWS)
def test_every_family(name: str) -> None:
    """Same shape, in range, other noise another view, the same noise the same; gradients reach every parameter."""
    view = distorting(VIEWS[name]())
    assert not any(p.requires_grad for p in view.parameters())
    view.thaw()
    images = IMAGES.float()
    first, again, other = (view.view(images, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert first.shape == images.shape
    assert torch.equal(first, again)
    assert (first - other).abs().amax((1, 2, 3)).gt(1e-3).all()
    assert first.min() >= 0
    assert first.max() <= 1
    view.view(images, torch.Generator().manual_seed(0)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in view.parameters())


def test_affine_and_colour_without_spread_change_nothing() -> None:
    images = IMAGES.float()
    for view in (Affine(spread=0.0), Colour(spread=0.0)):
        torch.testing.assert_close(view.view(images, torch.Generator()), images, rtol=0, atol=1e-5)


def test_an_edit_moves_no_pixel_further_than_its_strength() -> None:
    view = distorting(Generator(channels=3, strength=0.05))
    images = IMAGES.float() * 0.8 + 0.1
    with torch.no_grad():
        for parameter in view.parameters():
            parameter.mul_(20)
        gap = (view.view(images, torch.Generator().manual_seed(0)) - images).abs().max()
    assert 0.049 < gap <= 0.0501


class Decoder(nn.Module):
    """A generator of one's own, of which only a part is trained."""

    def __init__(self, size: float = 0.1) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.full((2,), size))
        self.kept = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, images: Tensor, z: Tensor) -> Tensor:
        return self.kept * images + (z @ self.direction).view(-1, 1, 1, 1)


def test_a_generator_of_ones_own() -> None:
    view = Generator(noise=2, model=Decoder, args={"size": 0.3})
    view.thaw()
    assert [name for name, p in view.named_parameters() if p.requires_grad] == ["model.direction"]
    z = torch.tensor([[0.5, 0.1], [0.0, 0.0]])
    torch.testing.assert_close(view.transform(IMAGES.float(), z)[0], (IMAGES[0].float() + 0.18).clamp(0, 1))
    with pytest.raises(InputError, match="requires gradient"):
        Generator(model=nn.Identity)


@pytest.mark.parametrize(
    "name, given, match",
    [
        ("hard.affine", {"shift": 0.0, "rotation": 0.0, "scale": 0.0, "shear": 0.0}, "nothing to vary"),
        ("hard.affine", {"rotation": 200.0}, "out of range"),
        ("hard.colour", {"low": 1.0, "high": 0.0}, "not below high"),
    ],
)
def test_what_cannot_be_is_refused(name: str, given: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        kdcore.build("augmentation", name, **given)


# ---- the demonstration's data -----------------------------------------------------------------------


def test_digits_are_framed_and_moved() -> None:
    image = torch.arange(1.0, 65.0).view(1, 8, 8)
    frame = framed(image, (2, -3))
    assert frame.shape == (1, 14, 14)
    assert torch.equal(frame[:, :8, 5:13], image)
    assert frame.sum() == image.sum()


def test_only_the_teacher_sees_shifts() -> None:
    centred, moving = shifted_digits(), shifted_digits(train_shift=3)
    assert all((x["input"][:, :3] == 0).all() for x in (centred.train[i] for i in range(20)))
    draws = [moving.train.augment(moving.train[0], np.random.default_rng(s))["input"] for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    mass = (centred.test.values["input"].sum((1, 2, 3)), shifted_digits(test_shift=0).test.values["input"])
    torch.testing.assert_close(mass[0], mass[1].sum((1, 2, 3)))
    assert not torch.equal(centred.test.values["input"], mass[1])
