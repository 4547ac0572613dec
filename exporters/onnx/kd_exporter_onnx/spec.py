"""What an export is told about a student: data only, so that a plain nn.Module needs no run."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError, model_validator

from kd_exporter_onnx.artefact import Axis, TensorSpec, check_arrays
from kd_exporter_onnx.errors import InputError, SpecError
from kd_exporter_onnx.preprocess import Preprocessing

Array = NDArray[Any]
Arrays = dict[str, Any]
Metric = Callable[[dict[str, Any], Any], float]


class ExportSpec(BaseModel):
    """Everything but the module.

    - inputs: in the order of forward, or with forward's parameter names. outputs: by name from a mapping or
      a model output, in order from a tuple. axes: the range of every name in a shape.
    - samples: real evaluation samples as the graph takes them, made by the training pipeline; the first axis
      is the sample. raw_samples: the same as a receiver has them (arrays, or a list of token sequences),
      needed with preprocessing or host. calibration: real training samples as the graph takes them, for
      static int8.
    - metric: metric(outputs by name, targets) -> float. reference_metric: what the training pipeline
      measured on these samples; left out, the metric of the module on `samples`.
    - host: a Python file with preprocess(inputs) and/or postprocess(outputs), on dictionaries of numpy
      arrays, for work around the graph (voxels, box decoding); it ships with the artefact.
    - absent: modules or parameters of training that must not be in the graph; absent_weights: such weights
      by value, when the module no longer holds them.
    - rule: the outputs on `samples` by the student's inference rule, computed by the student itself.
      rule_alternatives: what there would be without the rule (one head alone), which must be told apart.
    - compare_where: output -> mask input with the same leading axes; where the mask is 0 nothing is
      compared.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    name: str = "student"
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[str, ...]
    axes: dict[str, Axis] = {}
    samples: dict[str, Array]
    raw_samples: dict[str, Any] | None = None
    raw_inputs: tuple[TensorSpec, ...] = ()
    calibration: dict[str, Array] | None = None
    metric: Metric | None = None
    metric_name: str = "metric"
    higher_is_better: bool = True
    targets: Any = None
    reference_metric: float | None = None
    preprocessing: Preprocessing = Preprocessing()
    host: Path | None = None
    labels: tuple[str, ...] | None = None
    source: dict[str, JsonValue] = {}
    absent: tuple[str, ...] = ()
    absent_weights: dict[str, Array] = {}
    rule: dict[str, Array] | None = None
    rule_alternatives: dict[str, dict[str, Array]] = {}
    compare_where: dict[str, str] = {}

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc'])) or 'spec'}: {e['msg']}" for e in error.errors()]
            raise SpecError("; ".join(lines)) from None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for check in (
            self._check_axes,
            self._check_samples,
            self._check_raw,
            self._check_host,
            self._check_names,
        ):
            check()
        return self

    @property
    def batch_axis(self) -> str | None:
        """The name of every input's first axis, when they share one; None: the graph takes a fixed batch."""
        first = {spec.shape[0] if spec.shape else None for spec in self.inputs}
        name = first.pop() if len(first) == 1 else None
        return name if isinstance(name, str) else None

    @property
    def count(self) -> int:
        """The number of evaluation samples."""
        return len(self.samples[self.inputs[0].name])

    def is_dynamic(self, size: int | str) -> bool:
        """Whether the graph must take several sizes here; an axis with one allowed size is fixed."""
        return isinstance(size, str) and self.axes[size].min < self.axes[size].max

    def _check_axes(self) -> None:
        used = {size for spec in self.inputs for size in spec.shape if isinstance(size, str)}
        if used != self.axes.keys():
            raise ValueError(f"axes in the shapes are {sorted(used)}, axes with a range {sorted(self.axes)}")
        if not self.inputs or not self.outputs:
            raise ValueError("an export needs at least one input and one output")

    def _check_samples(self) -> None:
        for title, arrays in (("samples", self.samples), ("calibration", self.calibration)):
            if arrays is None:
                continue
            loose = [spec.model_copy(update={"shape": ("sample", *spec.shape[1:])}) for spec in self.inputs]
            counts = {len(value) for value in arrays.values()}
            try:
                check_arrays(loose, {k: a for k, a in self.axes.items() if k != self.batch_axis}, arrays)
            except InputError as error:
                raise ValueError(f"{title}: {error}") from error
            if len(counts) != 1 or not counts.pop():
                raise ValueError(f"{title}: every input must have the same number of samples, at least one")

    def _check_raw(self) -> None:
        if (self.preprocessing or self.host) and self.raw_samples is None:
            raise ValueError("preprocessing or host code is shipped but never run: give raw_samples")
        if self.raw_samples is not None and {len(v) for v in self.raw_samples.values()} != {self.count}:
            raise ValueError(f"raw_samples must be the same {self.count} samples as samples")

    def _check_host(self) -> None:
        if self.host is None:
            return
        try:
            body = ast.parse(self.host.read_text("utf-8")).body
        except SyntaxError as error:
            raise ValueError(f"{self.host.name} is no Python: {error}") from error
        names = {n.name for n in body if isinstance(n, ast.FunctionDef)}
        if not names & {"preprocess", "postprocess"}:
            raise ValueError(f"{self.host.name} has neither preprocess(inputs) nor postprocess(outputs)")

    def _check_names(self) -> None:
        inputs = {spec.name for spec in self.inputs}
        for title, named in (("rule", self.rule or {}), ("compare_where", self.compare_where)):
            if unknown := named.keys() - set(self.outputs):
                raise ValueError(f"{title} names {sorted(unknown)}; the outputs are {list(self.outputs)}")
        if unknown := set(self.compare_where.values()) - inputs:
            raise ValueError(f"compare_where names {sorted(unknown)}; the inputs are {sorted(inputs)}")
        if self.rule_alternatives and self.rule is None:
            raise ValueError("rule_alternatives need the rule's own outputs in rule")

    def receiver_inputs(self) -> tuple[TensorSpec, ...]:
        """What a receiver gives: declared, or read off raw_samples, or the graph's inputs."""
        if self.raw_inputs or self.raw_samples is None:
            return self.raw_inputs or self.inputs
        return tuple(self._described(name, value) for name, value in self.raw_samples.items())

    def _described(self, name: str, value: Any) -> TensorSpec:
        first = self.batch_axis or "batch"
        if isinstance(value, list):
            item = np.asarray(value[0])
            return TensorSpec(name=name, dtype=str(item.dtype), shape=(first, *["any"] * item.ndim))  # type: ignore[arg-type] # validated by pydantic
        return TensorSpec(name=name, dtype=str(value.dtype), shape=(first, *value.shape[1:]))  # type: ignore[arg-type] # validated by pydantic
