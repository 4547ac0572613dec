"""From a recipe's words to a detector: mmdetection3d's configs and registries, and nothing downloaded."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from kdcore.checkpoint import load_weights
from kdcore.errors import InputError, cause
from kdcore.signature import import_string, schema_of

NEEDS = "mmdet3d>=1.4,<1.5 with mmdet 3.x and mmcv 2.0 or 2.1 (the README of kd-plugin-mmdet3d says how)"


def load_detector(
    config: Mapping[str, Any] | str,
    args: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    checkpoint: str | None = None,
    place: str = "student",
) -> nn.Module:
    """The detector of a config, with weights from ``checkpoint`` or initialised as the config says.

    ``config``: the model's own table (with ``type``); the path of an OpenMMLab config file (``.py``), or the name of one
    of mmdet3d's own (``pointpillars/...``, without ``.py``), whose ``model`` is taken; or ``module:function``, called with
    ``args``, which returns such a table. Config files are Python and are run. ``options``: dotted keys over the table.
    Weights that a config wants downloaded (``init_cfg`` of type Pretrained) are left out.
    Raises InputError where mmdet3d is not installed, or cannot build this.
    """
    require()
    table = _table(config, args or {}, place)
    with quiet():
        from mmdet3d.registry import MODELS
        from mmdet3d.utils import register_all_modules
        from mmengine import Config
        from mmengine.registry import DefaultScope

        register_all_modules(init_default_scope=False)
        whole = Config({"model": table})
        try:
            whole.merge_from_dict({f"model.{key}": value for key, value in (options or {}).items()})
            with DefaultScope.overwrite_default_scope("mmdet3d"):
                detector: Any = MODELS.build(_without_downloads(whole.model))
                detector.init_weights()
        except Exception as error:  # registries and detectors raise anything on a config that does not fit
            raise InputError(f"{place}.config", f"mmdet3d cannot build it: {cause(error)}") from error
    if checkpoint:
        load_weights(detector, checkpoint, f"{place}.checkpoint")
    module: nn.Module = detector
    return module


@contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' warnings about their own code, and a page of log for each model that is made."""
    before = logging.root.manager.disable
    logging.disable(logging.INFO)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(before)


def require() -> None:
    """Raise InputError, in words, where the libraries are absent."""
    absent = [name for name in ("mmcv", "mmdet", "mmdet3d") if importlib.util.find_spec(name) is None]
    if absent:
        raise InputError("mmdet3d", f"{' and '.join(absent)} cannot be imported", allowed=NEEDS)


def _table(config: Mapping[str, Any] | str, args: Mapping[str, Any], place: str) -> dict[str, Any]:
    if isinstance(config, str) and ":" in config and not config.endswith(".py"):
        function: Callable[..., Any] = import_string(config, f"{place}.config")
        made = function(**schema_of(function, config).validate(args, f"{place}.args"))
    elif isinstance(config, str):
        made = _from_file(config, place)
    else:
        made = dict(config)
    if args and not (isinstance(config, str) and ":" in config):
        raise InputError(f"{place}.args", "are for a config that is a function, module:function", given=args)
    if not isinstance(made, Mapping) or "type" not in made:
        raise InputError(f"{place}.config", "is no model's table: it has no type", given=config)
    return dict(made)


def _from_file(name: str, place: str) -> Any:
    from mmengine import Config

    spec = importlib.util.find_spec("mmdet3d")
    own = Path(str(spec and spec.origin)).parent / ".mim" / "configs"
    found = Path(name) if name.endswith(".py") else own / f"{name}.py"
    if not found.is_file():
        raise InputError(
            f"{place}.config", "no such config file", given=name, allowed=f"a path, or one below {own}"
        )
    try:
        return Config.fromfile(found).get("model")
    except Exception as error:  # it is a program
        raise InputError(f"{place}.config", f"the config file fails: {cause(error)}", given=name) from error


def _without_downloads(table: Any) -> Any:
    """The same table without ``init_cfg`` of type Pretrained, at any depth."""
    if isinstance(table, dict):
        pretrained = (table.get("init_cfg") or {}) if isinstance(table.get("init_cfg"), dict) else {}
        if pretrained.get("type") == "Pretrained":
            table["init_cfg"] = None
        for value in table.values():
            _without_downloads(value)
    elif isinstance(table, list | tuple):
        for value in table:
            _without_downloads(value)
    return table
