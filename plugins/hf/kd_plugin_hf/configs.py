"""From what a recipe says to a transformers config: checked by name, so that a misspelt field is an error."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers import AutoModelForCausalLM as CausalLM
from transformers import AutoModelForImageClassification as ImageClassifier
from transformers import AutoModelForSequenceClassification as TextClassifier
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

from kdcore.errors import InputError, nearest

Head = Literal["causal-lm", "image-classification", "text-classification"]
AUTO: dict[str, Any] = {
    "causal-lm": CausalLM,
    "image-classification": ImageClassifier,
    "text-classification": TextClassifier,
}
CLASSES = {"ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm"} | {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
}
# taken by every config without being one of its fields
ALSO = ("num_labels", "attn_implementation", "rope_theta", "rope_scaling")


def make_config(config: Mapping[str, Any] | str | None, folder: Path | None, place: str) -> PreTrainedConfig:
    """The config of a table (``model_type`` and fields), of a JSON file, or of a checkpoint's folder.

    With ``folder`` a table holds only what differs from the checkpoint's own config. Raises InputError.
    """
    if isinstance(config, str):
        folder, config = Path(config), None
    tree = {} if folder is None else _read(folder, place)
    if config is not None:
        check_fields(config, str(config.get("model_type", tree.get("model_type", ""))), place)
        tree = {**tree, **config}
        if "num_labels" in config and "id2label" not in config:
            tree = {k: v for k, v in tree.items() if k not in ("id2label", "label2id")}
    cls = config_class(tree.pop("model_type", None), place)
    attention = str(tree.get("attn_implementation", ""))
    if "/" in attention:
        raise InputError(
            f"{place}.attn_implementation", "would be downloaded", given=attention, allowed="eager, sdpa"
        )
    try:
        return cls.from_dict(tree)
    except Exception as error:  # each config checks itself in its own way
        raise InputError(place, f"transformers refuses this config: {_words(error)}") from error


def config_class(model_type: Any, place: str) -> type[PreTrainedConfig]:
    if model_type is None:
        raise InputError(place, "needs model_type", hint='for example model_type = "llama"')
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{place}.model_type",
            "transformers has no such model (code that comes with a checkpoint is never run)",
            given=model_type,
            hint=nearest(str(model_type), list(CONFIG_MAPPING)),
        )
    found: type[PreTrainedConfig] = CONFIG_MAPPING[model_type]
    return found


def check_fields(config: Mapping[str, Any], model_type: str, place: str) -> None:
    """Every key is a field of that config (transformers itself would keep a misspelt one and ignore it)."""
    cls = config_class(model_type or None, place)
    known = {"model_type", *ALSO, *cls.attribute_map, *(f.name for f in dataclasses.fields(cls))}
    for key, value in config.items():
        if key not in known:
            raise InputError(
                f"{place}.{key}", f"no such field of {cls.__name__}", given=value, hint=nearest(key, known)
            )
        inner = cls.sub_configs.get(key)
        if isinstance(value, Mapping) and inner is not None:
            own = value.get("model_type") or getattr(inner, "model_type", "")
            check_fields(value, str(own), f"{place}.{key}")


def infer_head(config: PreTrainedConfig, head: Head | None, place: str) -> str:
    """What the model predicts: as said, or as its checkpoint was trained, or what its type is for."""
    fits = [name for name, auto in AUTO.items() if type(config) in auto._model_mapping]
    if head is not None:
        if head not in fits:
            what = f"{config.model_type} has no such head"
            raise InputError(f"{place}.head", what, given=head, allowed=fits or "none of these")
        return head
    trained = [h for a in config.architectures or () for end, h in CLASSES.items() if a.endswith(end)]
    # an encoder that can be a decoder too: its type does not say which
    either = "causal-lm" in fits and type(config) in MODEL_FOR_MASKED_LM_MAPPING
    if not trained and (either or not fits):
        raise InputError(f"{place}.head", "say what the model is to predict", allowed=fits or list(AUTO))
    return trained[0] if trained else fits[0]


def _read(path: Path, place: str) -> dict[str, Any]:
    """A config.json, or the one in a folder. Nothing is looked for anywhere else."""
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise InputError(
            place,
            f"no {'config.json in this' if path.is_dir() else 'such'} folder here, and nothing is downloaded",
            given=str(path),
            hint="fetch the model first (hf download NAME --local-dir FOLDER) and name the folder",
        )
    try:
        tree = json.loads(file.read_text("utf-8"))
    except (ValueError, OSError) as error:
        raise InputError(place, f"cannot be read as JSON: {_words(error)}", given=str(file)) from None
    if not isinstance(tree, dict):
        raise InputError(place, "not a config: the file holds no table", given=str(file))
    return tree


def _words(error: BaseException) -> str:
    """An error's own message, in one line."""
    return " ".join(str(error).split()) or type(error).__name__
