"""From a recipe's words to a transformers model with weights: local files only, and no code from them."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from kd_plugin_hf.configs import AUTO, Head, infer_head, make_config
from kdcore.checkpoint import load_weights
from kdcore.errors import InputError


@dataclass(frozen=True)
class Loaded:
    module: PreTrainedModel
    head: str


def load_model(
    config: Mapping[str, Any] | str | None,
    checkpoint: str | None,
    head: Head | None,
    dtype: str,
    fresh: Sequence[str],
    place: str,
) -> Loaded:
    """The model in training mode. ``checkpoint``: a folder of ``save_pretrained``, or a file of weights for
    ``config``; without one the weights are drawn from torch's global generator.

    ``fresh``: patterns of the weights that may be missing from a folder, or have another shape there, and are
    drawn. Raises InputError: a name that is no folder here, pickled weights, missing or misshapen weights.
    """
    folder = None if checkpoint is None or Path(checkpoint).is_file() else Path(checkpoint)
    if config is None and folder is None:
        raise InputError(
            place, "needs a config or a checkpoint folder", hint='config = { model_type = "llama", ... }'
        )
    made = make_config(
        config, folder, f"{place}.checkpoint" if folder and config is None else f"{place}.config"
    )
    kind = infer_head(made, head, place)
    with _quiet():
        if folder is not None:
            module = _from_folder(folder, made, kind, getattr(torch, dtype), fresh, f"{place}.checkpoint")
        else:
            module = _from_config(made, kind, getattr(torch, dtype), f"{place}.config")
    if checkpoint is not None and folder is None:
        load_weights(module, checkpoint, f"{place}.checkpoint")
    return Loaded(module.train(), kind)


def _from_config(config: PreTrainedConfig, head: str, dtype: torch.dtype, place: str) -> PreTrainedModel:
    try:
        module: PreTrainedModel = AUTO[head].from_config(config, dtype=dtype)
    except Exception as error:  # sizes that do not fit each other fail anywhere in a model's constructor
        raise InputError(
            place, f"no model can be made of this config: {type(error).__name__}: {error}"
        ) from error
    return module


def _from_folder(
    folder: Path, config: PreTrainedConfig, head: str, dtype: torch.dtype, fresh: Sequence[str], place: str
) -> PreTrainedModel:
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            place,
            "the folder has no .safetensors file (pickled weights are never loaded)",
            given=str(folder),
            hint="load it once where you trust it, and save_pretrained(FOLDER) it again",
        )
    try:
        module, report = AUTO[head].from_pretrained(
            str(folder),
            config=config,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except Exception as error:  # damaged files, sizes that do not fit, a quantiser that is not installed
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(place, f"cannot be loaded: {first}", given=str(folder)) from error
    missing = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    drawn = sorted(key for key in missing if not any(fnmatch.fnmatchcase(key, pattern) for pattern in fresh))
    if drawn:
        raise InputError(
            place,
            f"{len(drawn)} of the model's weights are not in this checkpoint, first {drawn[0]}",
            given=str(folder),
            hint=f'if they are to be trained anew: fresh = ["{drawn[0].partition(".")[0]}.*"]',
        )
    return module


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers prints a progress bar and a table of what it loaded; what matters of it is raised here."""
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
