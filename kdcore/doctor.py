"""``kd doctor``: what this environment has, and what in it will make trouble."""

from __future__ import annotations

import importlib
import importlib.metadata as metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from operator import itemgetter

from kdcore import plugins

NEEDED = ("kdcore", "torch", "mmengine", "torchmetrics", "pydantic", "pluggy")
OPTIONAL = ("transformers", "onnx", "onnxruntime")
SLOW = 0.05  # seconds to import a plugin; every command pays them
VARIABLES = ("KD_PLUGINS", "KD_DISABLE_PLUGINS", "OMP_NUM_THREADS", "WORLD_SIZE")


def report(echo: Callable[[str], object]) -> int:
    """Print versions, devices, plugins and problems; returns the number of problems."""
    registry = plugins.registry()  # before torch, whose objects make a pause of the garbage collector long
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    problems = [f"problem: {problem}" for problem in _problems(registry)]
    for line in (
        f"python {platform.python_version()} on {platform.platform()}, {os.cpu_count()} cores",
        *(f"  {name:<14}{_version(name) or 'not installed'}" for name in (*NEEDED, *OPTIONAL)),
        f"devices: {', '.join(devices) or 'cpu only'}; torch uses {torch.get_num_threads()} threads",
        *(f"  {variable}={os.environ[variable]}" for variable in VARIABLES if variable in os.environ),
        f"plugins: {len(registry.entries) - len(registry.quarantine)} ready, {len(registry.blocked)} blocked",
        *(f"  {name} takes {seconds * 1000:.0f} ms of every command" for name, seconds in _slow(registry)),
        *(problems or ["no problems found"]),
    ):
        echo(line)
    return len(problems)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _slow(registry: plugins.Registry) -> list[tuple[str, float]]:
    """The plugins that are slowest to import, the worst first."""
    found = [(entry.name, seconds) for entry, seconds in registry.seconds.items() if seconds > SLOW]
    return sorted(found, key=itemgetter(1), reverse=True)[:5]


def _is_there(module: str) -> bool:
    """Whether a module can be found, without importing it (its package is imported)."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # its package is not there, or raises
        return False


def _problems(registry: plugins.Registry) -> Iterator[str]:
    for fault in registry.quarantine:
        yield f"plugin {fault.entry.name} is in quarantine ({fault.phase}): {fault.error}"
    for entry, clash in registry.clashes():
        yield f"plugin {entry.name} of {entry.distribution}: {clash}"
    for kind, entry, component in registry.components():
        if not _is_there(module := component.target.partition(":")[0]):
            yield f"plugin {entry.name}: {kind} {component.name!r} lies in {module}, which is not there"
    if _version("onnxruntime") and _version("onnxruntime-gpu"):
        remedy = "pip uninstall onnxruntime onnxruntime-gpu, then install one"
        yield f"onnxruntime and onnxruntime-gpu are both installed and overwrite each other: {remedy}"
    if importlib.util.find_spec("cv2"):
        try:
            importlib.import_module("cv2")
        except ImportError as error:  # a missing libGL, mostly
            yield f"OpenCV, which mmengine imports, fails: {error}. pip install opencv-python-headless"
    if (free := shutil.disk_usage(".").free) < 2**30:
        yield f"only {free / 2**20:.0f} MiB are free here: checkpoints may not fit"
