"""One backend in a process of its own: answers `{"batch", "runs", "warm"}` lines with milliseconds per run.

Idle between questions, so that several backends can be measured in turns without their threads meeting.
"""

import inspect
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from kd_exporter_onnx import providers
from kd_exporter_onnx.artefact import MODEL, Provider, read
from kd_exporter_onnx.runtime import Host, Session
from kd_exporter_onnx.verification import example

Feeds = dict[str, Any]
Run = Callable[[Feeds], Any]


class Worker(BaseModel):
    """What to time: the artefact, or a pickled torch module, on the artefact's example inputs."""

    folder: Path
    backend: str
    module: Path | None = None
    compiled: bool = False
    provider: Provider
    threads: int


def main() -> None:
    worker = Worker.model_validate_json(sys.argv[1])
    answers, sys.stdout = sys.stdout, sys.stderr  # whatever libraries print must not look like an answer

    def answer(**words: Any) -> None:
        print(json.dumps(words), file=answers, flush=True)

    try:
        run, device = (_onnxruntime if worker.module is None else _torch)(worker)
        samples = example(worker.folder, "input")
        answer(device=device)
        for line in sys.stdin:
            question = json.loads(line)
            answer(ms=_time(run, tile(samples, question["batch"]), question["runs"], question["warm"]))
    except Exception as error:  # the reason is the answer
        answer(error=f"{type(error).__name__}: {error}".splitlines()[0])


def tile(samples: Feeds, batch: int) -> Feeds:
    """The example's rows, again from the first, as often as the batch needs."""
    return {name: value[np.arange(batch) % len(value)] for name, value in samples.items()}


def _time(run: Run, feeds: Feeds, runs: int, warm: int) -> list[float]:
    for _ in range(warm):
        run(feeds)
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run(feeds)
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _onnxruntime(worker: Worker) -> tuple[Run, str]:
    artefact = read(worker.folder)
    session = providers.open_session(worker.folder / MODEL, worker.provider, threads=worker.threads)
    loaded = Session(artefact, session, worker.provider, Host(None))
    if worker.provider == "cpu":
        return loaded.run_graph, worker.provider
    import torch  # inputs on the device, as a service that keeps them there has them; IO binding

    return lambda feeds: _wait(torch, loaded.run_graph(_on(torch, feeds, "cuda"))), worker.provider


def _torch(worker: Worker) -> tuple[Run, str]:
    import cloudpickle
    import torch

    torch.set_num_threads(worker.threads)
    device = "cuda" if worker.provider != "cpu" and torch.cuda.is_available() else "cpu"
    assert worker.module is not None
    module = cloudpickle.loads(worker.module.read_bytes()).to(device)
    by_name = set(example(worker.folder, "input")) <= inspect.signature(module.forward).parameters.keys()
    call = torch.compile(module) if worker.compiled else module

    def run(feeds: Feeds) -> Any:
        tensors = _on(torch, feeds, device)
        with torch.no_grad():
            return _wait(torch, call(**tensors) if by_name else call(*tensors.values()))

    return run, device


def _on(torch: Any, feeds: Feeds, device: str) -> Feeds:
    return {name: torch.from_numpy(value).to(device) for name, value in feeds.items()}


def _wait(torch: Any, outputs: Any) -> Any:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return outputs


if __name__ == "__main__":
    main()
