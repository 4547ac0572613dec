"""Taps: what is inside a model, read and replaced by module path."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

from kdcore.errors import InputError
from kdcore.taps import Taps


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_an_output_and_an_input_are_recorded(net: nn.Sequential) -> None:
    taps = Taps(net, {"hidden": "0", "head_in": "2.in"})
    x = torch.randn(5, 3)
    with taps.reading() as seen:
        net(x)
    assert torch.equal(seen["hidden"], net[0](x))
    assert torch.equal(seen["head_in"], net[1](net[0](x)))


def test_nothing_is_recorded_outside_the_block(net: nn.Sequential) -> None:
    taps = Taps(net, {"hidden": "0"})
    with taps.reading() as seen:
        pass
    net(torch.randn(1, 3))
    assert seen == {}


def test_a_replaced_tensor_goes_on_for_this_call_only(net: nn.Sequential) -> None:
    taps = Taps(net, {"hidden": "0", "head_in": "2.in"})
    x, plain = torch.randn(5, 3), None
    with torch.no_grad():
        plain = net(x)
        with taps.reading({"hidden": torch.zeros_like}) as seen:
            replaced = net(x)
    assert torch.equal(replaced, net[2](torch.zeros(5, 4)))
    assert not seen["head_in"].any()
    assert torch.equal(net(x), plain)
    expected = net[2](net[1](net[0](x)) + 1)
    with taps.reading({"head_in": lambda v: v + 1}):
        assert torch.allclose(net(x), expected)


def test_an_unknown_tap_to_replace_is_an_error(net: nn.Sequential) -> None:
    with pytest.raises(KeyError, match="other"), Taps(net, {"hidden": "0"}).reading({"other": torch.relu}):
        pass


def test_the_forward_stops_once_all_are_there(net: nn.Sequential) -> None:
    class Last(nn.Module):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            Last.calls += 1
            return x

    net.append(Last())
    taps = Taps(net, {"hidden": "0"})
    with taps.reading(stop=True) as seen:
        net(torch.randn(1, 3))
    assert Last.calls == 0
    assert set(seen) == {"hidden"}
    net(torch.randn(1, 3))
    assert Last.calls == 1


def test_a_tuple_gives_its_first_tensor_and_keeps_its_form() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return x, "state"

    net = nn.ModuleDict({"pair": Pair()})
    taps = Taps(net, {"pair": "pair"})
    with taps.reading({"pair": lambda v: v * 2}) as seen:
        assert net["pair"](torch.ones(1)) == (torch.tensor([2.0]), "state")
    assert seen["pair"].item() == 2.0


class State(NamedTuple):
    hidden: torch.Tensor
    extra: str


def test_a_named_tuple_keeps_its_names() -> None:
    class Named(nn.Module):
        def forward(self, x: torch.Tensor) -> State:
            return State(x, "more")

    net = nn.ModuleDict({"named": Named()})
    with Taps(net, {"named": "named"}).reading({"named": lambda v: v * 3}):
        assert net["named"](torch.ones(1)) == State(torch.tensor([3.0]), "more")


def test_an_input_that_is_given_by_keyword() -> None:
    net = nn.ModuleDict({"inner": nn.Linear(3, 2)})
    taps, x = Taps(net, {"x": "inner.in"}), torch.randn(4, 3)
    plain = net["inner"](input=x)  # outside a reading nothing is touched
    with taps.reading({"x": lambda v: v * 2}) as seen:
        doubled = net["inner"](input=x)
    assert torch.equal(seen["x"], x * 2)
    assert torch.allclose(doubled, net["inner"](x * 2))
    assert torch.equal(plain, net["inner"](x))


def test_what_is_no_tensor_is_refused_in_words() -> None:
    class Table(nn.Module):
        def forward(self, x: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
            return {}

    net = nn.ModuleDict({"table": Table()})
    for path, words in (("table", "here is dict"), ("table.in", "here is NoneType")):
        with pytest.raises(TypeError, match=words), Taps(net, {"t": path}).reading():
            net["table"]()
        net["table"]._forward_hooks.clear()


def test_a_wrong_path_names_the_nearest(net: nn.Sequential) -> None:
    named = nn.ModuleDict({"layer1": net})
    with pytest.raises(InputError) as caught:
        Taps(named, {"hidden": "laier1.0"})
    assert "did you mean 'layer1.0'?" in str(caught.value)
    assert "layer1.0" in str(caught.value)


def test_gradient_flows_through_what_is_read(net: nn.Sequential) -> None:
    taps = Taps(net, {"hidden": "0"})
    with taps.reading() as seen:
        net(torch.randn(1, 3))
    seen["hidden"].sum().backward()
    assert net[0].weight.grad is not None
    assert net[2].weight.grad is None
