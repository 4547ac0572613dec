"""Load an artefact and run it: digests first, then a session that checks its inputs. No torch, no kdcore."""

import importlib.util
import logging
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_exporter_onnx import providers, records
from kd_exporter_onnx.artefact import HOST, MODEL, Artefact, Provider, check_arrays, read
from kd_exporter_onnx.errors import ArtefactError, InputError

Array = NDArray[Any]
_log = logging.getLogger(__name__)


def load(
    folder: str | Path,
    provider: Provider | None = None,
    threads: int | None = None,
    *,
    digest: str | None = None,
    host_code: bool = False,
    tf32: bool = False,
) -> "Session":
    """A session on a verified artefact.

    provider: None takes the best one that works here and was verified, and says which (`session.provider`,
    the log); a name takes that one or raises. threads: for the work inside an operator; None leaves it to
    onnxruntime. digest: the sha256 of the manifest, as the export reported it, kept apart from the folder.
    host_code: run the Python file that ships with some artefacts; read it first. tf32: allow it on CUDA
    (needs its own verification). Raises ArtefactError, NoRuntimeError.
    """
    folder = Path(folder)
    artefact = read(folder, digest=digest)
    providers.runtime()
    host = _host(folder, artefact, allowed=host_code)
    if provider is not None:
        records.require(folder, artefact, provider, tf32=tf32)
        session = providers.open_session(folder / MODEL, provider, threads=threads, tf32=tf32)
        return Session(artefact, session, provider, host)
    return _best(folder, artefact, threads, host)


def _best(folder: Path, artefact: Artefact, threads: int | None, host: "Host") -> "Session":
    """The first of TensorRT, CUDA, CPU that is verified and opens; the CPU always is."""
    candidates: tuple[Provider, ...] = ("tensorrt", "cuda")
    for provider in candidates:
        if not records.verified(folder, artefact, provider):
            _say_unverified(folder, provider)
            continue
        try:
            session = providers.open_session(folder / MODEL, provider, threads=threads)
        except ArtefactError as error:
            _log.info("%s: %s", artefact.name, error)
            continue
        return Session(artefact, session, provider, host)
    return Session(artefact, providers.open_session(folder / MODEL, "cpu", threads=threads), "cpu", host)


def _say_unverified(folder: Path, provider: Provider) -> None:
    if providers.ORT_NAME[provider] in providers.runtime().get_available_providers():
        _log.warning("%s is not used: first run `kd-verify %s --provider %s`", provider, folder, provider)


class Host:
    """The two optional functions of an artefact's host.py: dictionaries of arrays in and out."""

    def __init__(self, module: ModuleType | None) -> None:
        self.before: Callable[[dict[str, Any]], dict[str, Any]] = getattr(module, "preprocess", dict)
        self.after: Callable[[dict[str, Any]], dict[str, Any]] = getattr(module, "postprocess", dict)


def load_host(path: Path) -> Host:
    """Runs the file: call it only on code that somebody decided to trust."""
    spec = importlib.util.spec_from_file_location(f"kd_host_{abs(hash(path))}", path)
    if spec is None or spec.loader is None:
        raise ArtefactError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Host(module)


def _host(folder: Path, artefact: Artefact, *, allowed: bool) -> Host:
    if not artefact.host_code:
        return Host(None)
    if not allowed:
        raise ArtefactError(
            f"{artefact.name} does part of its work in Python: read {folder / HOST}, "
            "then load(..., host_code=True)"
        )
    return load_host(folder / HOST)


class Session:
    """`session(inputs)`: raw inputs by name (or the only one itself) to outputs by name.

    numpy in, numpy out; torch in, torch out, on the same device (CUDA tensors stay on the GPU, by IO
    binding).
    """

    def __init__(self, artefact: Artefact, session: Any, provider: Provider, host: Host) -> None:
        self.artefact, self.provider = artefact, provider
        self._session, self._host = session, host
        _log.info("%s runs on %s", artefact.name, provider)

    def __repr__(self) -> str:
        inputs = ", ".join(f"{spec.name}: {spec.words()}" for spec in self.artefact.raw_inputs)
        return f"Session({self.artefact.name!r} on {self.provider}; {inputs})"

    def __call__(self, inputs: Any) -> dict[str, Any]:
        """Preprocessing, graph, postprocessing. InputError names what does not fit."""
        given = self._named(inputs)
        torch = _torch_of(given)
        if not self.artefact.preprocessing and not self.artefact.host_code:
            return self.run_graph(given)
        outputs = self._host.after(self.run_graph(self.prepare(given)))
        return (
            outputs if torch is None else {name: _to_torch(torch, value) for name, value in outputs.items()}
        )

    def prepare(self, inputs: Mapping[str, Any]) -> dict[str, Array]:
        """What the graph would be fed: declared preprocessing, then the host code's."""
        raw = {name: _to_numpy(value) for name, value in inputs.items()}
        lists = {name for name, value in raw.items() if isinstance(value, list | tuple)}
        specs = [spec for spec in self.artefact.raw_inputs if spec.name not in lists]
        check_arrays(specs, self.artefact.axes, {k: v for k, v in raw.items() if k not in lists})
        return self._host.before(self.artefact.preprocessing(raw))

    def run_graph(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """The graph alone, on its own inputs."""
        seen: dict[str, Any] = {name: _Seen(value) for name, value in feeds.items()}
        check_arrays(self.artefact.inputs, self.artefact.axes, seen)
        torch = _torch_of(feeds)
        if torch is not None and any(_on_gpu(value) for value in feeds.values()):
            return self._run_bound(torch, feeds)
        arrays = {name: np.ascontiguousarray(_to_numpy(value)) for name, value in feeds.items()}
        names = [spec.name for spec in self.artefact.outputs]
        outputs = dict(zip(names, self._session.run(names, arrays), strict=True))
        return (
            outputs if torch is None else {name: torch.from_numpy(value) for name, value in outputs.items()}
        )

    def _run_bound(self, torch: Any, feeds: Mapping[str, Any], device: str = "cuda") -> dict[str, Any]:
        """IO binding: inputs are read where they lie, outputs stay there; nothing crosses to the host."""
        binding = self._session.io_binding()
        held = {name: value.detach().to(device).contiguous() for name, value in feeds.items()}
        for spec in self.artefact.inputs:
            x = held[spec.name]
            index = x.device.index or 0
            binding.bind_input(spec.name, device, index, np.dtype(spec.dtype), tuple(x.shape), x.data_ptr())
        for spec in self.artefact.outputs:
            binding.bind_output(spec.name, device)
        if device == "cuda":
            torch.cuda.current_stream().synchronize()  # onnxruntime reads on a stream of its own
        self._session.run_with_iobinding(binding)
        pairs = zip(self.artefact.outputs, binding.get_outputs(), strict=True)
        # onnxruntime hands bool over as uint8
        return {spec.name: torch.from_dlpack(value).to(getattr(torch, spec.dtype)) for spec, value in pairs}

    def _named(self, inputs: Any) -> dict[str, Any]:
        if isinstance(inputs, Mapping):
            return dict(inputs)
        names = [spec.name for spec in self.artefact.raw_inputs]
        if len(names) != 1:
            raise InputError(f"this artefact has the inputs {names}: give a dictionary")
        return {names[0]: inputs}


class _Seen:
    """dtype and shape of numpy's or torch's, without a copy."""

    def __init__(self, value: Any) -> None:
        self.shape: tuple[int, ...] = tuple(np.shape(value) if not _is_torch(value) else value.shape)
        self.ndim = len(self.shape)
        name = str(value.dtype).removeprefix("torch.") if _is_torch(value) else np.asarray(value).dtype
        self.dtype = np.dtype(name) if name != "bfloat16" else name

    def __repr__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _torch_of(values: Mapping[str, Any]) -> Any:
    """torch, when a tensor of it is among the values; never imported from here."""
    return sys.modules["torch"] if any(_is_torch(value) for value in values.values()) else None


def _on_gpu(value: Any) -> bool:
    return _is_torch(value) and value.device.type == "cuda"


def _to_numpy(value: Any) -> Any:
    """Arrays as they are; a list stays a list, for steps that take sequences of different length."""
    return value.detach().cpu().numpy() if _is_torch(value) else value


def _to_torch(torch: Any, value: Any) -> Any:
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value
