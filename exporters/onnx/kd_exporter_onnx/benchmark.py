"""Latency and throughput of an artefact against torch, measured in turns, one process for each backend."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from kd_exporter_onnx import providers
from kd_exporter_onnx.artefact import MODEL, Artefact, Provider, read
from kd_exporter_onnx.bench_worker import Worker
from kd_exporter_onnx.errors import ArtefactError
from kd_exporter_onnx.verification import example


class Row(BaseModel):
    """One backend at one batch size; milliseconds for a call, samples a second."""

    backend: str
    device: str
    batch: int
    p50_ms: float
    p95_ms: float
    min_ms: float
    samples_per_second: float
    runs: int


class Benchmark(BaseModel):
    """benchmark.json. `placement`: which provider ran each node; `missing`: backends that failed, and why."""

    rows: list[Row] = []
    placement: dict[str, dict[str, int]] = {}
    missing: dict[str, str] = {}
    threads: int = 0
    rounds: int = 0
    cpu: str = ""
    load_average: list[float] = []

    def row(self, backend: str, batch: int) -> Row:
        return next(row for row in self.rows if (row.backend, row.batch) == (backend, batch))

    def __str__(self) -> str:
        heads = f"{'p50 ms':>10}{'p95 ms':>10}{'min ms':>10}{'samples/s':>12}"
        lines = [f"{'backend':<16}{'device':<9}{'batch':>6}{heads}"]
        for row in self.rows:
            times = (
                f"{row.p50_ms:>10.3f}{row.p95_ms:>10.3f}{row.min_ms:>10.3f}{row.samples_per_second:>12.1f}"
            )
            lines.append(f"{row.backend:<16}{row.device:<9}{row.batch:>6}{times}")
        lines += [f"{name}: not measured: {why}" for name, why in self.missing.items()]
        lines += [f"{name} ran {sum(found.values())} nodes" for name, found in self.placement.items()]
        load = ", ".join(f"{value:.1f}" for value in self.load_average)
        return "\n".join(
            [*lines, f"{self.threads} threads, {self.rounds} rounds, {self.cpu}, load average {load}"]
        )


def bench(
    folder: str | Path,
    module: Any = None,
    teacher: Any = None,
    *,
    provider: Provider = "cpu",
    batches: Sequence[int] = (1, 8, 32),
    threads: int | None = None,
    rounds: int = 5,
    runs: int = 10,
    compiled: bool = True,
) -> Benchmark:
    """Time the artefact, and, where given, the student in torch (eager, compiled) and its teacher (eager).

    Each backend has a process of its own and all are asked in turns, `rounds` times `runs` calls for each
    batch size: in one process their thread pools would slow each other down many times over, and one after
    the other a change of the machine's load would look like a difference. Inputs are the artefact's example.
    """
    folder = Path(folder).resolve()
    artefact = read(folder)
    count = threads or os.cpu_count() or 1
    base = Worker(folder=folder, backend="onnxruntime", provider=provider, threads=count)
    result = Benchmark(threads=count, rounds=rounds, cpu=_cpu(), load_average=list(os.getloadavg()))
    feeds = example(folder, "input")
    result.placement = providers.placement(folder / MODEL, provider, feeds)
    with tempfile.TemporaryDirectory() as work:
        workers = [base, *_torch_workers(base, module, teacher, Path(work), compiled)]
        backends = [_Backend(worker) for worker in workers]
        try:
            _measure(backends, _allowed(artefact, batches), rounds, runs)
        finally:
            for backend in backends:
                backend.close()
    for backend in backends:
        result.rows += backend.rows()
        result.missing |= {backend.name: backend.error} if backend.error else {}
    return result


def _torch_workers(base: Worker, module: Any, teacher: Any, work: Path, compiled: bool) -> list[Worker]:
    workers = []
    for name, model, variants in (("torch", module, (False, True)), ("teacher", teacher, (False,))):
        if model is None:
            continue
        import cloudpickle  # takes classes of scripts and notebooks along

        path = work / f"{name}.pickle"
        path.write_bytes(cloudpickle.dumps(model))
        for compile_it in variants if compiled else (False,):
            title = f"{name}-{'compile' if compile_it else 'eager'}"
            workers.append(base.model_copy(update={"backend": title, "module": path, "compiled": compile_it}))
    return workers


def _allowed(artefact: Artefact, batches: Sequence[int]) -> list[int]:
    """The batch sizes that the artefact takes; its own where the batch is fixed."""
    first = artefact.inputs[0].shape[0]
    if isinstance(first, int):
        return [first]
    sizes = [size for size in batches if artefact.axes[first].allows(size)]
    if not sizes:
        raise ArtefactError(
            f"none of the batch sizes {list(batches)} is allowed: {artefact.axes[first].words()}"
        )
    return sizes


def _measure(backends: list["_Backend"], batches: Sequence[int], rounds: int, runs: int) -> None:
    for number in range(rounds):
        for batch in batches:
            for backend in backends[number % len(backends) :] + backends[: number % len(backends)]:
                backend.ask(batch, runs, warm=3 if number == 0 else 1)
                time.sleep(0.1)  # onnxruntime's threads spin on for up to 50 ms after a call


class _Backend:
    """A worker process and what it answered."""

    def __init__(self, worker: Worker) -> None:
        self.name, self.error, self.device = worker.backend, "", ""
        self.times: dict[int, list[float]] = {}
        command = [sys.executable, "-m", "kd_exporter_onnx.bench_worker", worker.model_dump_json()]
        # The student's class is found where this process found it.
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OMP_NUM_THREADS": str(worker.threads),
        }
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.device = str(self._answer().get("device", ""))

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"error": "the process died"}
        self.error = str(answer.get("error", ""))
        return answer

    def ask(self, batch: int, runs: int, warm: int) -> None:
        if self.error:
            return
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"batch": batch, "runs": runs, "warm": warm}) + "\n")
        self.process.stdin.flush()
        self.times.setdefault(batch, []).extend(self._answer().get("ms", []))

    def close(self) -> None:
        """Ends this process; it stops by itself when its input ends."""
        self.process.communicate()

    def rows(self) -> list[Row]:
        return [self._row(batch, np.array(times)) for batch, times in self.times.items() if times]

    def _row(self, batch: int, times: np.ndarray[Any, Any]) -> Row:
        return Row(
            backend=self.name,
            device=self.device,
            batch=batch,
            p50_ms=float(np.percentile(times, 50)),
            p95_ms=float(np.percentile(times, 95)),
            min_ms=float(times.min()),
            samples_per_second=float(batch * 1e3 / times.mean()),
            runs=len(times),
        )


def _cpu() -> str:
    """The processor's name where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
