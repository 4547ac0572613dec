"""onnxruntime and its execution providers: which is installed, what it can use, what really ran."""

import json
import platform
import tempfile
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kd_exporter_onnx.artefact import Provider
from kd_exporter_onnx.errors import ArtefactError, NoRuntimeError

ORT_NAME: dict[Provider, str] = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
CPU_COMMAND = 'pip install "kd-exporter-onnx[cpu]"'
GPU_COMMAND = 'pip install "kd-exporter-onnx[gpu]"'
# Where the time goes: one of these on the CPU makes "it runs on the GPU" untrue. Shape arithmetic may stay:
# onnxruntime itself puts it there.
HEAVY = frozenset(
    ("Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "FusedConv", "Gemm", "QGemm", "MatMul",
     "FusedMatMul", "MatMulInteger", "QLinearMatMul", "DynamicQuantizeMatMul", "Attention",
     "MultiHeadAttention", "GroupQueryAttention", "LSTM", "GRU")
)  # fmt: skip


def installed(names: tuple[str, ...] = ("onnxruntime", "onnxruntime-gpu")) -> tuple[str, ...]:
    """The onnxruntime distributions in this environment; both own the same import package."""
    return tuple(name for name in names if any(metadata.distributions(name=name)))


def runtime() -> Any:
    """The onnxruntime module; NoRuntimeError with the commands when there is none, or two."""
    if len(installed()) > 1:
        raise NoRuntimeError(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: run "
            f"`pip uninstall -y onnxruntime onnxruntime-gpu`, then `{CPU_COMMAND}` or `{GPU_COMMAND}`"
        )
    try:
        import onnxruntime
    except ImportError as error:
        raise NoRuntimeError(
            f"no onnxruntime here: run `{CPU_COMMAND}`, or on a machine with an NVIDIA GPU `{GPU_COMMAND}`"
        ) from error
    return onnxruntime


def machine() -> dict[str, str]:
    """What a verification holds for: the runtime's version and the processor's architecture."""
    return {"onnxruntime": str(runtime().__version__), "architecture": platform.machine()}


def open_session(
    model: Path | bytes,
    provider: Provider,
    *,
    threads: int | None = None,
    tf32: bool = False,
    profile: Path | None = None,
) -> Any:
    """An onnxruntime session that runs on `provider`, or ArtefactError saying why it cannot.

    onnxruntime falls back to the CPU without raising, so what it reports afterwards is compared with what was
    asked.
    """
    ort = runtime()
    if ORT_NAME[provider] not in ort.get_available_providers():
        raise ArtefactError(
            f"provider {provider!r} is not in this onnxruntime ({ort.__version__}): `{GPU_COMMAND}`"
        )
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors: the warnings are about its own graph rewriting
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=_chain(provider, tf32), enable_fallback=0)
    if session.get_providers()[0] != ORT_NAME[provider]:
        raise ArtefactError(
            f"asked for {provider!r}, but onnxruntime fell back to {session.get_providers()[0]}: no device, "
            "or the CUDA libraries that this onnxruntime-gpu wants are missing"
        )
    return session


def _chain(provider: Provider, tf32: bool) -> list[Any]:
    """Providers in order; TF32 is off unless asked for, because it costs three decimal digits."""
    cuda = (ORT_NAME["cuda"], {"use_tf32": str(int(tf32))})
    first: dict[Provider, list[Any]] = {"cpu": [], "cuda": [cuda], "tensorrt": [ORT_NAME["tensorrt"], cuda]}
    return [*first[provider], ORT_NAME["cpu"]]


def placement(
    model: Path, provider: Provider, feeds: Mapping[str, NDArray[Any]], *, tf32: bool = False
) -> dict[str, dict[str, int]]:
    """Which provider really ran each node: provider -> operator -> count, from onnxruntime's own profile."""
    with tempfile.TemporaryDirectory() as folder:
        session = open_session(model, provider, tf32=tf32, profile=Path(folder) / "profile")
        session.run(None, {name: np.asarray(value) for name, value in feeds.items()})
        return read_profile(json.loads(Path(session.end_profiling()).read_text()))


def read_profile(events: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """The kernels of a profile by provider and operator."""
    counts: dict[str, Counter[str]] = {}
    for event in events:
        arguments = event.get("args", {})
        if event.get("name", "").endswith("_kernel_time") and arguments.get("provider"):
            counts.setdefault(arguments["provider"], Counter())[arguments["op_name"]] += 1
    return {name: dict(sorted(operators.items())) for name, operators in sorted(counts.items())}


def misplaced(nodes: Mapping[str, Mapping[str, int]], provider: Provider) -> dict[str, int]:
    """The heavy operators that ran on the CPU although another provider was asked for."""
    if provider == "cpu":
        return {}
    on_cpu = nodes.get(ORT_NAME["cpu"], {})
    return {operator: count for operator, count in on_cpu.items() if operator in HEAVY}
