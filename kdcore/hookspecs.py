"""The hooks that a plugin may implement. This file is their manual.

A plugin is an ordinary pip package with one entry point in the group ``kdcore``, named by its slug::

    [project.entry-points.kdcore]
    pld = "kd_plugin_pld"

The module that it names is imported whenever plugins are listed, so it must be light: kdcore's light
names (``Component``, ``hookimpl``), the standard library, and no torch. It answers each hook with
components, which say where the thing itself is found::

    @hookimpl
    def kd_losses():
        yield Component("pld", "kd_plugin_pld.loss:pld_loss", summary="Plackett-Luce list-wise loss")

All hooks are called once, when plugins are listed, with no arguments; a hook returns (or yields) any
number of components. What a component does in a run is said by its kind (``kdcore.kinds``) and by the
events below (``RunEvents``), which are methods of the component itself: a run asks only the components
that its recipe names, in the recipe's order, so an installed plugin that no recipe names never runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import pluggy

from kdcore.types import Batch, Component

if TYPE_CHECKING:
    from kdcore.types import Outputs

GROUP = "kdcore"
hookspec = pluggy.HookspecMarker(GROUP)
hookimpl = pluggy.HookimplMarker(GROUP)


class Declarations:
    """What an installed plugin offers."""

    @hookspec
    def kd_teachers(self) -> Iterable[Component]:  # type: ignore[empty-body]
        """Teachers: classes derived from ``kdcore.kinds.Teacher``; ``forward(batch) -> Outputs``.

        Run without gradient and in eval mode, unless a component declares ``grad_through``.
        """

    @hookspec
    def kd_students(self) -> Iterable[Component]:  # type: ignore[empty-body]
        """Students: ``kdcore.kinds.Student``; forward, ``task_loss``, and ``infer``, the inference rule."""

    @hookspec
    def kd_routers(self) -> Iterable[Component]:  # type: ignore[empty-body]
        """Routers: ``kdcore.kinds.Router``; weights [B,K] over K teachers, and which of them run at all."""

    @hookspec
    def kd_losses(self) -> Iterable[Component]:  # type: ignore[empty-body]
        """Losses: a plain function on tensors, or ``kdcore.kinds.Loss`` where there is state."""

    @hookspec
    def kd_augmentations(self) -> Iterable[Component]:  # type: ignore[empty-body]
        """Augmentations: ``kdcore.kinds.Augmentation``; what data the student sees."""

    @hookspec
    def kd_stages(self) -> Iterable[Component]:  # type: ignore[empty-body]
        """Stages: ``kdcore.kinds.Stage``; procedures beyond the standard ``distill``."""

    @hookspec
    def kd_probes(self) -> Iterable[Component]:  # type: ignore[empty-body]
        """Probes: ``kdcore.kinds.Probe``; metrics and analyses of trained models."""

    @hookspec
    def kd_exporters(self) -> Iterable[Component]:  # type: ignore[empty-body]
        """Exporters: turn a trained student into an artefact (``kdcore.kinds.Exporter``)."""


class RunEvents:
    """Events of a run, in the order in which they happen. Any component may have any of them.

    An implementation may leave out arguments that it does not need; an argument that the event does not
    have, or an event that does not exist, is an error before the run starts. A loss changes its state in its
    events, never in ``forward``.
    """

    @hookspec
    def setup(self) -> None:
        """Once, after everything is built and before the optimisers are: ``self.run`` is there.

        Modules made here are trained and saved like any other.
        """

    @hookspec
    def on_epoch(self, epoch: int) -> None:
        """At the start of every epoch (from 0)."""

    @hookspec
    def before_step(self, batch: Batch, clean: Batch) -> None:
        """Before the student's forward, once per optimiser step; ``batch`` is augmented, ``clean`` is not yet.

        The place for inner loops and critics (``run.update``).
        """

    @hookspec
    def after_step(self, batch: Batch, student: Outputs, teachers: dict[str, Outputs]) -> None:
        """After the optimisers' step.

        ``student`` (or a dict of them by stream) and ``teachers`` are detached; a routed teacher's ``rows`` say
        which samples it answered for, and one that ran on none is left out.
        """

    @hookspec
    def before_eval(self) -> None:
        """Before every evaluation on held-out data."""

    @hookspec
    def finish(self) -> None:
        """After the last step: tuning on the split ``tune``, before the last evaluation and export."""


EVENTS: frozenset[str] = frozenset(name for name in vars(RunEvents) if not name.startswith("_"))
# a method with one of these beginnings that is no event is taken for a misspelt one
EVENT_PREFIXES = ("on_", "before_", "after_")
HOOKS: dict[str, str] = {
    name: name.removeprefix("kd_").removesuffix("es" if name == "kd_losses" else "s")
    for name in vars(Declarations)
    if name.startswith("kd_")
}
