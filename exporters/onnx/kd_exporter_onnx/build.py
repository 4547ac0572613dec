"""One export, step by step, in a temporary folder."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx
import torch
from torch import nn

from kd_exporter_onnx import card, gates, replay, triton
from kd_exporter_onnx.artefact import (
    EXAMPLE,
    HOST,
    MANIFEST,
    MODEL,
    Artefact,
    Precision,
    Provider,
    seal,
    sha256,
)
from kd_exporter_onnx.benchmark import Benchmark, bench
from kd_exporter_onnx.capture import Graph, capture
from kd_exporter_onnx.cases import Case, Cases, record, reference, rows_of
from kd_exporter_onnx.compare import tolerance
from kd_exporter_onnx.describe import describe, private_paths
from kd_exporter_onnx.errors import ArtefactError
from kd_exporter_onnx.grid import chunk_size, cut, export_point, sample_point
from kd_exporter_onnx.metric import gate_metric, gate_preprocessing, shipped_feeds
from kd_exporter_onnx.parity import gate_parity, gate_reload, gate_rule
from kd_exporter_onnx.providers import open_session
from kd_exporter_onnx.report import Parity, Report
from kd_exporter_onnx.spec import Array, ExportSpec

Int8 = Literal["static", "dynamic"]
EXAMPLES = 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """OnnxExporter's parameters."""

    precision: Precision
    provider: Provider
    opset: int
    max_drop: float
    tolerance: float | None
    int8: Literal["auto", "static", "dynamic"]
    allow_operators: tuple[str, ...]
    benchmark: Literal["none", "quick", "full"]


class Build:
    """Every step either returns or raises; the caller removes the temporary folder in both cases."""

    def __init__(self, module: nn.Module, spec: ExportSpec, options: Options, work: Path) -> None:
        self.module, self.spec, self.options, self.work = module, spec, options, work
        self.graph = Graph(module, spec)
        self.folder, self.cases_folder = work / "artefact", work / "cases"
        for folder in (self.folder, self.cases_folder):
            folder.mkdir()
        self.quantisation: Int8 | None = None
        self.parity = Parity(
            tolerance=self._tolerance(options.precision),
            judged_by_metric=options.precision == "int8",
            samples=spec.count,
        )
        self.providers = self._present()

    def run(self) -> Report:
        self._capture()
        cases = record(self.graph, self.spec, self.cases_folder)
        self.parity.left_out = cases.left_out
        if self.options.precision != "fp32":
            # A wrong graph must not hide behind the looser tolerance of what it is converted to.
            self._replay(replace(cases, raw=[]), "fp32", "cpu")
            self._convert()
        for provider in self.providers:
            self._replay(cases, self.options.precision, provider)
            self.parity.metric = gate_metric(self.spec, cases, self.options.max_drop)
            self._gate("preprocessing", gate_preprocessing, self.spec, cases, self.parity.tolerance)
        self._example(cases)
        return self._finish()

    def _gate(self, name: str, gate: Callable[..., Any], *arguments: Any) -> None:
        self.parity.gates[name] = gate(*arguments)

    def _tolerance(self, precision: Precision, provider: Provider = "cpu") -> float:
        own = self.options.tolerance if precision == self.options.precision else None
        return tolerance(precision, provider) if own is None else own

    def _present(self) -> tuple[Provider, ...]:
        """The CPU, and the target where this machine has it; else the artefact ships without, and says so."""
        target = self.options.provider
        if target == "cpu":
            return ("cpu",)
        value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
        graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "probe", [value], [])
        graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1]))
        opset = [onnx.helper.make_opsetid("", self.options.opset)]
        probe = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10)
        try:
            open_session(probe.SerializeToString(), target)
        except ArtefactError as error:
            self.parity.not_verified[target] = str(error)
            return ("cpu",)
        return ("cpu", target)

    def _capture(self) -> None:
        """model.onnx in fp32, past every gate that needs no run of it."""
        feeds = cut(self.spec, export_point(self.spec))[0]
        tensors = {name: torch.from_numpy(value) for name, value in feeds.items()}
        ordered = tuple(tensors[name] for name in self.graph.inputs)
        self._gate("eval", gates.gate_eval, self.module)
        self._gate("pure", gates.gate_pure, self.graph, ordered, self.graph.outputs)
        captured = capture(self.module, self.spec, tensors, self.options.opset, self.folder / MODEL)
        model = onnx.load(captured.path)
        self._gate("absent", gates.gate_absent, self.spec, self.module, captured.used, model)
        self._gate("axes", gates.gate_axes, model, self.spec)
        self._graph_gates()
        if self.spec.host is not None:
            shutil.copyfile(self.spec.host, self.folder / HOST)

    def _graph_gates(self) -> None:
        model = onnx.load(self.folder / MODEL, load_external_data=False)
        self._gate("random", gates.gate_random, model)
        self._gate("domains", gates.gate_domains, model, self.options.allow_operators)
        self._gate("checker", gates.gate_checker, self.folder / MODEL)

    def _replay(self, cases: Cases, precision: Precision, provider: Provider) -> None:
        """Seal a draft, reload it in a fresh process, hold its numbers against the student's."""
        allowed = self._tolerance(precision, provider)
        seal(self.folder, self._describe(precision))
        placement = gate_reload(self.folder, cases, provider, self.work)
        compared = gate_parity(self.spec, cases, allowed, precision, provider)
        if precision == "fp32":
            self._gate("rule", gate_rule, self.spec, cases, allowed)
        if precision == self.options.precision:
            self.parity.placement[provider] = placement
            self.parity.compared += compared

    def _describe(self, precision: Precision) -> Artefact:
        return describe(
            self.folder,
            self.spec,
            opset=self.options.opset,
            precision=precision,
            quantisation=self.quantisation,
            target=self.options.provider,
            verified=self.providers,
            tolerance=self._tolerance(precision),
        )

    def _convert(self) -> None:
        from kd_exporter_onnx import precision  # onnxruntime's quantiser takes a second to import

        model, fp32 = self.folder / MODEL, self.work / "fp32"
        fp32.mkdir()
        for path in self.folder.glob(f"{MODEL}*"):
            path.rename(fp32 / path.name)
        source = fp32 / MODEL
        if self.options.precision == "fp16":
            precision.half(source, model)
        else:
            self.quantisation = precision.quantise(source, model, self.options.int8, self.spec)
        self._graph_gates()

    def _example(self, cases: Cases) -> None:
        """example.npz: a few samples raw and as the graph takes them, and what it must give."""
        size = chunk_size(self.spec, EXAMPLES)
        point = sample_point(self.spec) | ({self.spec.batch_axis: size} if self.spec.batch_axis else {})
        feeds, rows = cut(self.spec, point)
        if cases.raw:
            feeds = {name: value[:size] for name, value in shipped_feeds(cases.raw[0]).items()}
        arrays = {f"input/{name}": value for name, value in feeds.items()}
        arrays |= {f"output/{name}": value for name, value in self._expected(feeds).items()}
        for name, value in (self.spec.raw_samples or {}).items():
            arrays[f"raw/{name}"] = rows_of(value, rows)
        replay.save(self.folder / EXAMPLE, arrays)

    def _expected(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """The student's outputs; int8, judged by the metric only, must reproduce its own."""
        if self.options.precision != "int8":
            return reference(self.graph, feeds)
        session = open_session(self.folder / MODEL, "cpu")
        return dict(zip(self.spec.outputs, session.run(list(self.spec.outputs), feeds), strict=True))

    def _finish(self) -> Report:
        artefact = seal(self.folder, self._describe(self.options.precision))
        benchmark = self._benchmark()
        triton.write(self.folder, artefact)
        self._gate("files", gates.gate_files, self.folder, private_paths(self.module))
        self._write("benchmark.json", benchmark.model_dump_json(indent=1) + "\n")
        self._write("parity.json", self.parity.model_dump_json(indent=1) + "\n")
        self._write("README.md", card.card(artefact, self.parity))
        artefact = seal(self.folder, artefact)
        self._last_look()
        return Report(
            folder=self.folder, digest=sha256(self.folder / MANIFEST), artefact=artefact, parity=self.parity
        )

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def _benchmark(self) -> Benchmark:
        if self.options.benchmark == "none":
            return Benchmark()
        quick = self.options.benchmark == "quick"
        shape = {"batches": (chunk_size(self.spec, 1),), "compiled": False, "rounds": 3} if quick else {}
        return bench(self.folder, self.module, provider=self.providers[-1], **shape)  # type: ignore[arg-type] # a choice of keywords

    def _last_look(self) -> None:
        """The finished folder, once more from disk in a fresh process: digests, session, the example."""
        gates.gate_files(self.folder, private_paths(self.module))
        with_example = {kind: replay.restore(self.folder / EXAMPLE) for kind in ("input", "output")}
        feeds, expected = (
            {n.removeprefix(f"{kind}/"): v for n, v in arrays.items() if n.startswith(f"{kind}/")}
            for kind, arrays in with_example.items()
        )
        path = self.cases_folder / "example.npz"
        replay.save(path, feeds)
        rows = torch.arange(len(next(iter(feeds.values())))).numpy()
        cases = Cases([Case(path, {}, feeds, expected, rows, len(rows))], [])
        for provider in self.providers:
            gate_reload(self.folder, cases, provider, self.work)
            gate_parity(
                self.spec,
                cases,
                self._tolerance(self.options.precision, provider),
                self.options.precision,
                provider,
            )
