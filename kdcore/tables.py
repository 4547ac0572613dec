"""The tables of a recipe: what may stand in them, with types and ranges. Components' own keys are extra."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
# names become files, folders and modules: nothing that leaves the run folder or that a module's name forbids
_NAME, _TITLE = r"^[A-Za-z0-9][A-Za-z0-9_-]*$", r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
Name = Annotated[str, Field(pattern=_NAME, max_length=80)]
Title = Annotated[str, Field(pattern=_TITLE, max_length=80)]
FORMS = {
    _NAME: "a letter or digit, then letters, digits, _ and -",
    _TITLE: "a letter or digit, then letters, digits, _, - and .",
}


class Table(BaseModel):
    """A table whose keys are all known, unless a derived one allows extra keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    noun: ClassVar[str] = "key"  # what an unknown one is called


class Use(Table):
    """A table that names a component (or an optimiser); its other keys are that component's parameters."""

    model_config = ConfigDict(extra="allow")
    use: str = Field(min_length=1)

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Ramp(Table):
    """A weight that goes linearly from ``start`` to ``end`` between two points of the run's progress."""

    start: float
    end: float
    begin: Annotated[float, Field(ge=0, le=1)] = 0.0
    until: Annotated[float, Field(gt=0, le=1)] = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> Ramp:
        if self.begin >= self.until:
            raise ValueError(f"begin ({self.begin:g}) must be before until ({self.until:g})")
        return self

    def at(self, progress: float) -> float:
        share = (progress - self.begin) / (self.until - self.begin)
        return self.start + (self.end - self.start) * min(max(share, 0.0), 1.0)


class LossTable(Use):
    name: Name | None = None
    weight: Annotated[float, Field(ge=0)] | Ramp = 1.0
    teacher: str | list[str] | None = None
    stream: str | list[str] | None = None
    reads: dict[str, dict[str, str]] = {}
    optimizer: Use | None = None


class TeacherTable(Use):
    train: dict[str, Any] | None = None
    data: dict[str, Any] = {}
    view: dict[str, str] = {}
    shard: bool = False


class StudentTable(Use):
    train: list[str] | None = None
    hold_eval: list[str] = []
    view: dict[str, str] = {}


class RouterTable(Use):
    teachers: list[str] | None = None
    optimizer: Use | None = None


class AugmentationTable(Use):
    name: Name | None = None
    optimizer: Use | None = None
    method: bool = False  # part of what is compared: the arms `none` and `kd` do without it


class StageTable(Use):
    name: Name | None = None

    @property
    def over(self) -> dict[str, Any]:
        """The tables that the stage lays over the recipe's."""
        return {key: value for key, value in super().params.items() if key in STAGE_TABLES}

    @property
    def params(self) -> dict[str, Any]:
        return {key: value for key, value in super().params.items() if key not in STAGE_TABLES}


class DataTable(Table):
    use: Literal["module", "ids"] = "module"
    source: str = ""
    args: dict[str, Any] = {}
    batch_size: Positive | dict[str, Positive] = 64
    eval_batch_size: Positive = 256
    epoch: str | None = None
    forward: Literal["joint", "separate"] = "joint"
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    tune: Share = 0.0
    split_seed: int = 0
    count: Positive | None = None


class Schedule(Table):
    use: Literal["constant", "cosine", "linear"] = "cosine"
    warmup: Share = 0.0


class TrainTable(Table):
    epochs: Positive | None = None
    steps: Positive | None = None
    optimizer: Use = Use(use="AdamW", lr=1e-3)  # type: ignore[call-arg]
    schedule: Schedule = Schedule()
    clip: Annotated[float, Field(gt=0)] | None = None
    accumulate: Positive = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    strategy: Literal["replicate", "fsdp"] = "replicate"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Positive | None = None
    eval_every: Positive = 1
    checkpoint_every: Positive | None = None
    keep: Literal["last", "best"] = "last"

    @model_validator(mode="after")
    def _one_length(self) -> TrainTable:
        if self.epochs and self.steps:
            raise ValueError("epochs and steps are both given: keep one")
        return self


class TaskTable(Table):
    use: Literal["classification", "language", "regression", "segmentation", "own", "none"] = "classification"
    metrics: list[str] | None = None
    weight: Annotated[float, Field(ge=0)] = 1.0
    label_smoothing: Share = 0.0
    stream: str | list[str] | None = None


class ReportTable(Table):
    baseline: bool = False
    guards: bool = True
    visualizers: list[str] = []


class Recipe(Table):
    """A whole recipe. See docs/recipes.md for each key."""

    model_config = ConfigDict(title="the recipe")
    name: Title = "run"
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    data: DataTable
    student: StudentTable
    teacher: dict[Name, TeacherTable] = {}
    router: RouterTable | None = None
    augmentation: list[AugmentationTable] = []
    task: TaskTable = TaskTable()
    loss: list[LossTable] = []
    train: TrainTable = TrainTable()
    stage: list[StageTable] = []
    probe: list[Use] = []
    report: ReportTable = ReportTable()
    export: Use | None = None


STAGE_TABLES = frozenset(Recipe.model_fields) - {"name", "description", "seed", "stage", "export"}
