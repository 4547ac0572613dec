"""The fresh process of an export: reload the artefact from disk and run recorded cases. Imports no torch.

`python -m kd_exporter_onnx.replay JOB.json`; every case's outputs are written beside its inputs, then
status.json.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel

from kd_exporter_onnx import providers
from kd_exporter_onnx.artefact import HOST, MODEL, Provider, read
from kd_exporter_onnx.runtime import Host, Session, load_host

Array = NDArray[Any]
Arrays = dict[str, Any]


class Job(BaseModel):
    """`graph` cases hold the graph's inputs, `raw` cases a receiver's."""

    folder: Path
    provider: Provider
    threads: int | None = None
    graph: list[Path]
    raw: list[Path] = []
    status: Path


class Status(BaseModel):
    """How far it came: `step` is the first one that failed (opening, or a case's file name), or None."""

    step: str | None = None
    error: str = ""
    placement: dict[str, dict[str, int]] = {}


def save(path: Path, arrays: Arrays) -> None:
    """Arrays, and lists of arrays of different shape, without pickle."""
    flat: dict[str, Array] = {}
    for name, value in arrays.items():
        if isinstance(value, list):
            flat |= {f"{name}#{index:06d}": np.asarray(item) for index, item in enumerate(value)}
        else:
            flat[name] = np.asarray(value)
    if pickled := [name for name, value in flat.items() if value.dtype.hasobject]:
        raise ValueError(f"{pickled[0]} holds Python objects")
    np.savez(path, **flat)  # before numpy 2.1, allow_pickle=False would be taken for an array


def restore(path: Path) -> Arrays:
    """What `save` wrote."""
    arrays: Arrays = {}
    with np.load(path, allow_pickle=False) as file:
        for key in file.files:
            name, mark, _ = key.partition("#")
            if mark:
                arrays.setdefault(name, []).append(file[key])
            else:
                arrays[name] = file[key]
    return arrays


def output_of(case: Path) -> Path:
    return case.with_suffix(".out.npz")


def run(job: Job) -> Status:
    """Digests, session, cases. A failure is reported, not raised: the exporting process words it."""
    step = "open"
    try:
        artefact = read(job.folder)
        session = providers.open_session(job.folder / MODEL, job.provider, threads=job.threads)
        host = load_host(job.folder / HOST) if artefact.host_code else Host(None)
        loaded = Session(artefact, session, job.provider, host)
        for case in job.graph:
            step = case.name
            save(output_of(case), loaded.run_graph(restore(case)))
        for case in job.raw:
            step = case.name
            raw = restore(case)
            prepared = {f"prepared/{name}": value for name, value in loaded.prepare(raw).items()}
            save(output_of(case), loaded(raw) | prepared)
        nodes = providers.placement(job.folder / MODEL, job.provider, restore(job.graph[0]))
    except Exception as error:  # whatever onnxruntime raises is the finding
        return Status(step=step, error=f"{type(error).__name__}: {error}")
    return Status(placement=nodes)


def main() -> None:
    job = Job.model_validate_json(Path(sys.argv[1]).read_text())
    job.status.write_text(run(job).model_dump_json())


if __name__ == "__main__":
    main()
