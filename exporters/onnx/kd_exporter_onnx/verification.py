"""`kd-verify ARTEFACT`: does the artefact give its expected outputs here, on this provider? No torch."""

import argparse
import sys
from pathlib import Path

import numpy as np

from kd_exporter_onnx import providers, records
from kd_exporter_onnx.artefact import EXAMPLE, MANIFEST, MODEL, Artefact, Provider, read, sha256
from kd_exporter_onnx.compare import Array, difference, tolerance
from kd_exporter_onnx.errors import ArtefactError, NoRuntimeError
from kd_exporter_onnx.runtime import Host, Session


def example(folder: Path, kind: str) -> dict[str, Array]:
    """example.npz's arrays of a kind: "input" (what the graph takes) or "output" (what it must give)."""
    with np.load(folder / EXAMPLE, allow_pickle=False) as arrays:
        prefix = f"{kind}/"
        return {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}


def verify(
    folder: str | Path, provider: Provider = "cpu", *, tf32: bool = False, threads: int | None = None
) -> records.Record:
    """Run example.npz on `provider`, compare, see where every node ran, write the record that `load` wants.

    Raises ArtefactError and writes nothing when the provider is absent, falls back, or gives other numbers.
    """
    folder = Path(folder)
    artefact = read(folder)
    session = providers.open_session(folder / MODEL, provider, threads=threads, tf32=tf32)
    feeds, expected = example(folder, "input"), example(folder, "output")
    actual = Session(artefact, session, provider, Host(None)).run_graph(feeds)
    allowed = max(artefact.tolerance, tolerance(artefact.precision, provider, tf32=tf32))
    differences = _compare(artefact, provider, feeds, expected, actual, allowed)
    nodes = providers.placement(folder / MODEL, provider, feeds, tf32=tf32)
    if wrong := providers.misplaced(nodes, provider):
        raise ArtefactError(f"{provider} was asked for, but these operators ran on the CPU: {wrong}")
    record = records.Record(
        manifest=sha256(folder / MANIFEST),
        provider=provider,
        tf32=tf32,
        machine=providers.machine(),
        tolerance=allowed,
        differences=differences,
        placement=nodes,
    )
    records.path_of(folder, provider, tf32=tf32).write_text(record.model_dump_json(indent=1) + "\n")
    return record


def _compare(
    artefact: Artefact,
    provider: Provider,
    feeds: dict[str, Array],
    expected: dict[str, Array],
    actual: dict[str, Array],
    allowed: float,
) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, value in expected.items():
        mask = artefact.compare_where.get(name)
        result = difference(value, actual[name], None if mask is None else feeds[mask] != 0)
        if not result.within(allowed):
            how = result.problem or f"differs by {result.relative:.3g} of its scale, allowed {allowed:.3g}"
            raise ArtefactError(f"on {provider}, output {name!r}, row {result.row} of the example: {how}")
        found[name] = result.relative
    return found


def main(arguments: list[str] | None = None) -> int:
    """0: verified, the record is written; 1: other numbers, or not on this provider; 2: wrong usage."""
    parser = argparse.ArgumentParser(prog="kd-verify", description=__doc__)
    parser.add_argument("artefact", type=Path, help="the artefact folder")
    parser.add_argument("--provider", choices=sorted(providers.ORT_NAME), default="cpu")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 on CUDA, under its own tolerance")
    parser.add_argument("--threads", type=int, default=None)
    given = parser.parse_args(arguments)
    try:
        record = verify(given.artefact, given.provider, tf32=given.tf32, threads=given.threads)
    except (ArtefactError, NoRuntimeError, OSError) as error:
        print(f"kd-verify: {error}", file=sys.stderr)
        return 1
    worst = max(record.differences.values(), default=0.0)
    counts = ", ".join(f"{name}: {sum(nodes.values())} nodes" for name, nodes in record.placement.items())
    print(
        f"verified on {record.provider}: largest difference {worst:.2g} of scale, "
        f"allowed {record.tolerance:.2g}"
    )
    print(f"ran on {counts}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
