"""The artefact folder: what artefact.json says, and the digests that guard every file. No torch."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from kd_exporter_onnx.errors import ArtefactError, InputError
from kd_exporter_onnx.preprocess import Preprocessing

Array = NDArray[Any]
DType = Literal["float32", "float16", "float64", "int64", "int32", "uint8", "int8", "bool"]
Provider = Literal["cpu", "cuda", "tensorrt"]
Precision = Literal["fp32", "fp16", "int8"]
MANIFEST, DESCRIPTION, MODEL, EXAMPLE, HOST = (
    "MANIFEST.sha256",
    "artefact.json",
    "model.onnx",
    "example.npz",
    "host.py",
)


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Axis(_Record):
    """The sizes that a dynamic axis may take: the multiples of `multiple_of` from min to max."""

    min: int = Field(default=1, ge=1)
    max: int = Field(ge=1)
    multiple_of: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max < self.min or self.min % self.multiple_of or self.max % self.multiple_of:
            raise ValueError("min and max must be multiples of multiple_of, and min <= max")
        return self

    def allows(self, size: int) -> bool:
        return self.min <= size <= self.max and size % self.multiple_of == 0

    def words(self) -> str:
        multiple = f", a multiple of {self.multiple_of}" if self.multiple_of > 1 else ""
        return f"{self.min} to {self.max}{multiple}"


class TensorSpec(_Record):
    """An array by name: an int in `shape` is fixed, a name is an axis (unconstrained when it has no Axis)."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def words(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


class Provenance(_Record):
    """Where the student came from: library versions, and whatever the caller knows (run, recipe, licence)."""

    created: str
    versions: dict[str, str]
    machine: str
    source: dict[str, JsonValue] = {}


class Artefact(_Record):
    """artefact.json. `files` holds the sha256 of every file but itself and the manifest."""

    schema_version: Literal[1] = 1
    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    axes: dict[str, Axis]
    raw_inputs: tuple[TensorSpec, ...] = Field(description="what a receiver gives, before preprocessing")
    preprocessing: Preprocessing
    host_code: bool = Field(description="host.py does work before or after the graph; loaded only on request")
    labels: tuple[str, ...] | None = None
    opset: int
    precision: Precision
    quantisation: Literal["static", "dynamic"] | None = None
    target: Provider = Field(description="the provider that the export was meant for")
    verified: tuple[Provider, ...] = Field(description="the providers on which every gate ran at export")
    tolerance: float = Field(description="largest difference accepted, as a share of an output's own scale")
    compare_where: dict[str, str] = {}
    provenance: Provenance
    files: dict[str, str] = {}


def json_schema() -> str:
    """The published JSON schema of artefact.json, as the text of artefact.schema.json."""
    return json.dumps(Artefact.model_json_schema(), indent=1, sort_keys=True) + "\n"


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digests(folder: Path, *, skip: Iterable[str] = ()) -> dict[str, str]:
    """sha256 by relative POSIX path of every file in the folder, sorted."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in files}
    return {name: sha256(path) for name, path in names.items() if name not in set(skip)}


def seal(folder: Path, artefact: Artefact) -> Artefact:
    """Write artefact.json with the digests of all other files, then the manifest over everything."""
    sealed = artefact.model_copy(update={"files": digests(folder, skip=(MANIFEST, DESCRIPTION))})
    (folder / DESCRIPTION).write_text(sealed.model_dump_json(indent=1) + "\n")
    lines = [f"{digest}  {name}\n" for name, digest in digests(folder, skip=(MANIFEST,)).items()]
    (folder / MANIFEST).write_text("".join(lines))
    return sealed


def read_manifest(folder: Path) -> dict[str, str]:
    """Digest by file name; the format of `sha256sum`, so `sha256sum -c MANIFEST.sha256` checks it too."""
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtefactError(f"{folder} is not an artefact: it has no {MANIFEST}")
    pairs = [line.split("  ", 1) for line in path.read_text().splitlines()]
    if any(len(pair) != 2 for pair in pairs):
        raise ArtefactError(f"{MANIFEST} of {folder} is damaged: a line is not 'digest  name'")
    return {name: digest for digest, name in pairs}


def read(folder: Path, *, digest: str | None = None) -> Artefact:
    """artefact.json, after every file's digest was compared; ArtefactError names the first file that differs.

    The digests find damage, and a file that was changed or swapped on its own. Somebody who rewrites all of
    them is found only by `digest`, the sha256 of the manifest, kept elsewhere.
    """
    manifest = read_manifest(folder)
    if digest is not None and sha256(folder / MANIFEST) != digest:
        raise ArtefactError(f"{folder} is not the artefact with the digest {digest}: its manifest differs")
    if DESCRIPTION not in manifest:
        raise ArtefactError(f"{MANIFEST} of {folder} does not cover {DESCRIPTION}: it was edited")
    for name, expected in manifest.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise ArtefactError(f"{MANIFEST} of {folder} names a file outside it: {name}")
        if not path.is_file():
            raise ArtefactError(f"{folder} is incomplete: {name} is missing")
        if sha256(path) != expected:
            raise ArtefactError(f"{name} in {folder} is not the file that was exported: its sha256 differs")
    artefact = _parse(folder)
    if artefact.files != {name: value for name, value in manifest.items() if name != DESCRIPTION}:
        raise ArtefactError(f"{DESCRIPTION} and {MANIFEST} of {folder} disagree: one of them was edited")
    return artefact


def _parse(folder: Path) -> Artefact:
    try:
        return Artefact.model_validate_json((folder / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{DESCRIPTION} of {folder} cannot be read: {error}") from error


def check_arrays(specs: Iterable[TensorSpec], axes: Mapping[str, Axis], arrays: Mapping[str, Array]) -> None:
    """InputError unless names, dtypes and shapes are as declared and each axis has one size in its range."""
    wanted = {spec.name: spec for spec in specs}
    if missing := sorted(wanted.keys() - arrays.keys()):
        raise InputError(f"input {missing[0]!r} is missing; the inputs are {sorted(wanted)}")
    if extra := sorted(arrays.keys() - wanted.keys()):
        raise InputError(f"there is no input {extra[0]!r}; the inputs are {sorted(wanted)}")
    sizes: dict[str, tuple[int, str]] = {}
    for name, spec in wanted.items():
        _check_array(spec, axes, arrays[name], sizes)


def _check_array(
    spec: TensorSpec, axes: Mapping[str, Axis], x: Array, sizes: dict[str, tuple[int, str]]
) -> None:
    given = f"input {spec.name!r} must be {spec.words()}, got {x.dtype}{list(x.shape)}"
    if x.dtype != np.dtype(spec.dtype):
        raise InputError(f"{given}: convert it with .astype({spec.dtype!r})")
    if x.ndim != len(spec.shape):
        raise InputError(f"{given}: {x.ndim} axes instead of {len(spec.shape)}")
    for position, (declared, size) in enumerate(zip(spec.shape, x.shape, strict=True)):
        if isinstance(declared, int):
            if size != declared:
                raise InputError(f"{given}: axis {position} has {size} elements instead of {declared}")
        elif declared in axes:
            _check_size(declared, axes[declared], size, given, spec.name, sizes)


def _check_size(
    name: str, axis: Axis, size: int, given: str, owner: str, sizes: dict[str, tuple[int, str]]
) -> None:
    if not axis.allows(size):
        raise InputError(f"{given}: {name} is {size}, allowed is {axis.words()}")
    first, where = sizes.setdefault(name, (size, owner))
    if first != size:
        raise InputError(f"{given}: {name} is {size} here and {first} in input {where!r}")
