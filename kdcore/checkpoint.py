"""Files that hold weights and state: written whole or not at all, loaded without running code."""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from kdcore.errors import InputError, RunError, cause


@contextmanager
def writing(path: Path, *also: type[Exception]) -> Iterator[None]:
    """What keeps this block from writing ``path`` (no right, no space, no such place) as a RunError that says so.

    ``also``: what a library raises for it besides OSError.
    """
    kinds: tuple[type[Exception], ...] = (OSError, *also)
    try:
        yield
    except kinds as error:
        reason = getattr(error, "strerror", None) or cause(error)
        raise RunError(f"{path}: cannot be written: {reason}") from error


@contextmanager
def replacing(path: Path, *also: type[Exception]) -> Iterator[Path]:
    """A temporary name to write to, synced and renamed to ``path`` when the block ends well, else removed.

    Raises RunError as ``writing`` does.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path, *also):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield draft
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(draft, path)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as draft:
        draft.write_text(text, "utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, default=str) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = {}) -> None:
    """Tensors alone, as safetensors; shared storage is written once a name."""
    plain = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    with replacing(path, safetensors.SafetensorError) as draft:
        safetensors.torch.save_file(plain, draft, dict(metadata))


def load_tensors(path: str | os.PathLike[str], place: str) -> dict[str, Tensor]:
    """A state dict from .safetensors, or from a torch file that holds tensors only."""
    file, given = Path(path), str(path)
    if not file.is_file():
        raise InputError(place, "no such checkpoint file", given=given)
    try:
        found: Any = safetensors.torch.load_file(file) if file.suffix == ".safetensors" else load_state(file)
    except pickle.UnpicklingError as error:
        raise _not_loaded(error, place, given) from None
    except Exception as error:  # a damaged file makes its reader raise anything
        raise InputError(place, f"damaged checkpoint: {cause(error, 150)}", given=given) from None
    for key in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise InputError(place, "not a state dict: names and tensors", given=given)
    return {str(name): value for name, value in found.items()}


def _not_loaded(error: pickle.UnpicklingError, place: str, given: str) -> InputError:
    """torch's message without its advice to load the file unsafely."""
    if named := re.search(r"(?:GLOBAL|unsupported class) ([\w.]+)", str(error)):
        problem = f"the checkpoint holds more than weights ({named[1]}); pickled code is never run"
        hint = "save model.state_dict() alone, best as .safetensors"
        return InputError(place, problem, given=given, hint=hint)
    reason = str(error).partition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
    return InputError(place, f"a damaged checkpoint, or none of torch's: {reason}".rstrip(": "), given=given)


def load_weights(module: nn.Module, path: str | os.PathLike[str], place: str) -> None:
    """Load every weight of ``module`` from a file, or say which are missing, unknown or of another shape.

    A prefix ``module.`` of all names is taken off: a teacher that a run trained has it, and a model saved in torch's DDP.
    """
    found, wanted = load_tensors(path, place), module.state_dict()
    if found and all(name.startswith("module.") for name in found) and not found.keys() & wanted.keys():
        found = {name.removeprefix("module."): value for name, value in found.items()}
    shapes = [(k, tuple(found[k].shape), tuple(v.shape)) for k, v in wanted.items() if k in found]
    wrong = {
        "missing": [k for k in wanted if k not in found],
        "unknown": [k for k in found if k not in wanted],
        "of another shape": [
            f"{k}: file {file}, model {model}" for k, file, model in shapes if file != model
        ],
    }
    if any(wrong.values()):
        parts = [f"{len(names)} {what}, first {names[0]}" for what, names in wrong.items() if names]
        problem = f"the checkpoint is of another architecture: {'; '.join(parts)}"
        raise InputError(place, problem, given=str(path))
    module.load_state_dict(found)


def _safe_types() -> list[Any]:
    """What mmengine and torch's own optimisers put into a checkpoint besides tensors."""
    from mmengine.logging.history_buffer import HistoryBuffer

    methods = dict(HistoryBuffer()._statistics_methods)

    def statistic(owner: Any, name: Any) -> Any:
        """Stands for getattr, by which a HistoryBuffer names its methods (mean, min, ...), and gives only those."""
        if owner is HistoryBuffer and name in methods:
            return methods[name]
        raise pickle.UnpicklingError(f"unsupported class {owner!r}.{name!r}")

    dtypes = {type(np.dtype(kind)) for kind in ("float64", "float32", "int64", "int32", "bool", "uint32")}
    made_by = [
        each.__reduce__()[0] for each in (np.array(0), np.float64(0))
    ]  # numpy's functions that rebuild them
    return [HistoryBuffer, (statistic, "builtins.getattr"), np.ndarray, np.dtype, *made_by, *dtypes]


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    with replacing(path, RuntimeError) as draft:
        torch.save(dict(state), draft)


def load_state(path: Path) -> Any:
    """A torch file under weights-only rules, with what mmengine puts beside the tensors allowed."""
    with torch.serialization.safe_globals(_safe_types()), warnings.catch_warnings(action="ignore"):
        return torch.load(path, map_location="cpu", weights_only=True)


def newest_state(folder: Path, say: Callable[[str], None] = print) -> tuple[Path, dict[str, Any]] | None:
    """The newest state in ``folder`` that loads whole; ``say`` is told of damaged ones, which are passed over."""
    for path in sorted(folder.glob("step-*.state"), reverse=True):
        try:
            return path, dict(load_state(path))
        except Exception as error:
            say(f"{path.name} is damaged ({type(error).__name__}), using the one before it")
    return None
