"""What can go wrong, in words that say what to do. Imports nothing."""

from collections.abc import Mapping


class ArtefactError(RuntimeError):
    """An artefact that must not be used as asked: damaged, edited, or not verified for that provider."""


class NoRuntimeError(ImportError):
    """No usable onnxruntime: none installed, or two that overwrite each other."""


class InputError(ValueError):
    """An input that does not fit what the artefact declares; names the input and both sides."""


class SpecError(ValueError):
    """An export specification that is incomplete or contradicts itself, found before anything runs."""


class Refused(RuntimeError):  # noqa: N818 - reads as the verdict it is, and is the name users see
    """An export that a gate refused; nothing was left at the destination.

    `gate` is the gate's name, `output` and `sample` say where it shows (sample: row of the evaluation
    samples), `point` holds the sizes of the dynamic axes, `distance` and `allowed` are in the gate's own
    unit.
    """

    def __init__(
        self,
        gate: str,
        reason: str,
        *,
        output: str | None = None,
        sample: int | None = None,
        point: Mapping[str, int] | None = None,
        distance: float | None = None,
        allowed: float | None = None,
    ) -> None:
        self.gate, self.reason, self.output, self.sample = gate, reason, output, sample
        self.point, self.distance, self.allowed = dict(point or {}), distance, allowed
        super().__init__(self._words())

    def _words(self) -> str:
        where = [f"output {self.output!r}"] if self.output is not None else []
        where += [f"sample {self.sample}"] if self.sample is not None else []
        where += [", ".join(f"{axis}={size}" for axis, size in self.point.items())] if self.point else []
        place = f" [{'; '.join(where)}]" if where else ""
        far = f" ({self.distance:.3g}, allowed {self.allowed:.3g})" if self.distance is not None else ""
        return f"export refused at gate {self.gate!r}{place}: {self.reason}{far}"
