"""A student whose weights are quantised in every forward, while the optimiser keeps and moves full-precision ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kd_plugin_topkld.quantiser import FakeQuantise, Scheme
from kdcore import Batch, InputError, Outputs, Student


class Quantised(Student):
    """``base``, any student, with the weights of its linear layers and convolutions fake-quantised.

    ``layers``: name patterns of the modules to quantise, of those that have such a weight; ``keep``: patterns of those
    that stay as they are (embeddings always do). ``bits``, ``scheme``, ``group`` as of ``quantise``. ``start``: the
    teacher whose weights it begins with, which is then the same model in full precision. What is shipped is ``base``
    with the quantised weights written out.
    """

    def __init__(
        self,
        *,
        base: Student,
        bits: Annotated[int, Field(ge=2, le=8)] = 4,
        layers: list[str] = ["*"],  # noqa: B006 - never written to
        keep: list[str] = [],  # noqa: B006
        scheme: Scheme = "symmetric",
        group: Annotated[int, Field(gt=0)] | None = None,
        start: str | None = None,
    ) -> None:
        super().__init__()
        self.base, self.start = base, start
        self.input_names = base.input_names
        self.names = self._chosen(layers, keep)
        for name in self.names:
            layer = base.model.get_submodule(name)
            size = layer.weight[0].numel()  # type: ignore[index]
            if group is not None and size % group:
                raise InputError(
                    "student.group", f"does not divide the {size} inputs of {name!r}", given=group
                )
            parametrize.register_parametrization(layer, "weight", FakeQuantise(bits, scheme, group))

    def _chosen(self, layers: list[str], keep: list[str]) -> list[str]:
        kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
        known = [name for name, module in self.base.model.named_modules() if isinstance(module, kinds)]
        for place, patterns in (("layers", layers), ("keep", keep)):
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in known):
                    problem = "no linear layer or convolution of this name"
                    raise InputError(f"student.{place}", problem, given=pattern, allowed=known)
        return [n for n in known if _fits(n, layers) and not _fits(n, keep)]

    def setup(self) -> None:
        self.base.run = self.run
        if self.start is None:
            return
        if self.start not in self.run.teachers:
            raise InputError(
                "student.start", "no such teacher", given=self.start, allowed=list(self.run.teachers)
            )
        theirs = self.run.teachers[self.start].model.state_dict()
        mine = self.base.model.state_dict()
        found = {name.replace("parametrizations.", "").removesuffix(".original"): name for name in mine}
        if {k: theirs[k].shape for k in theirs} != {k: mine[v].shape for k, v in found.items()}:
            raise InputError("student.start", "this teacher is another model than the base", given=self.start)
        self.base.model.load_state_dict({found[name]: value for name, value in theirs.items()})

    # ---- the contract, as the base answers it -----------------------------------------------------

    @property
    def model(self) -> nn.Module:
        return self.base.model

    def forward(self, batch: Batch) -> Outputs:
        said: Outputs = self.base(batch)
        return said

    def task_loss(self, outputs: Outputs, batch: Batch) -> Any:
        return self.base.task_loss(outputs, batch)

    def supervised(self, batch: Batch) -> Tensor | None:
        return self.base.supervised(batch)

    def infer(self, outputs: Outputs) -> dict[str, Tensor]:
        return self.base.infer(outputs)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return self.base.inputs(batch)

    def shapes(self, inputs: Mapping[str, Tensor]) -> Any:
        return self.base.shapes(inputs)

    def host(self, batch: Batch) -> Any:
        return self.base.host(batch)

    def graph(self, outputs: Outputs) -> dict[str, Tensor]:
        return self.base.graph(outputs)

    def written_out(self) -> Student:
        """A copy of the base whose weights are the quantised ones: no quantiser, no master weights."""
        plain = copy.deepcopy(self.base)
        for name in self.names:
            _plain(plain.model.get_submodule(name))
        return plain

    def deploy(self) -> nn.Module:
        return self.written_out().deploy()

    def parameters_to_ship(self) -> dict[str, Tensor]:
        return self.written_out().parameters_to_ship()


def _fits(name: str, patterns: list[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _plain(layer: nn.Module) -> None:
    """Undo the parametrisation, in place, with the weight as it is now.

    torch's ``remove_parametrizations`` takes the property off the class, which a copy shares with its original.
    """
    weight = layer.weight.detach()  # type: ignore[operator]
    layer.__class__ = type(layer).__bases__[0]
    del layer.parametrizations
    layer.weight = nn.Parameter(weight.clone())
