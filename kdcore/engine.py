"""The engine: mmengine's Runner, its hooks, optimiser wrappers, schedulers and visualizers.

What the Runner lacks is added as hooks: exact resume in the middle of an epoch, states written whole,
leaving on a signal, metrics as JSON lines that a resume neither doubles nor drops.
"""

from __future__ import annotations

import itertools
import json
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from kdcore import memory, parallel
from kdcore.build import own_optimizers, trainable
from kdcore.checkpoint import load_tensors, newest_state, save_state, save_tensors
from kdcore.data import Source, StepSampler
from kdcore.distill import Distiller
from kdcore.errors import InputError, Interrupted, RunError
from kdcore.guards import check_finite
from kdcore.progress import Progress
from kdcore.signals import Stop
from kdcore.tables import TrainTable, Use
from kdcore.task import higher_is_better

SAVE_SECONDS = 30.0
KEEP_STATES = 2
LOG_STEPS = 10
_serial = itertools.count()


@dataclass
class Fit:
    """One training, ready to run: a prepared distiller and everything that decides its bits."""

    distiller: Distiller
    source: Source
    train: TrainTable
    folder: Path
    evaluate: Callable[[], dict[str, float]]
    make_optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    optimizer_tables: Mapping[str, Use] = field(default_factory=dict)
    identity: str = ""
    title: str = "train"
    visualizers: tuple[str, ...] = ()
    progress: Progress = field(default_factory=lambda: Progress(quiet=True))

    @property
    def run(self) -> Any:
        return self.distiller.run

    @property
    def states(self) -> Path:
        return self.folder / "state"

    @property
    def metrics_file(self) -> Path:
        return self.folder / "metrics.jsonl"


def fit(job: Fit) -> dict[str, Any]:
    """Train until the last step; resumes from the newest whole state in the job's folder, if there is one.

    Returns seconds and peak memory in bytes (of this process), steps, the metrics of the last (or best)
    evaluation, and guards.
    """
    runner = make_runner(job)
    memory.reset_peak()
    began = time.perf_counter()
    job.distiller.guards.remember(_frozen_teachers(job.distiller))
    try:
        with job.progress.task(job.title, job.run.total_steps):
            runner.train()
    finally:
        _close(runner)
    job.distiller.guards.unchanged(_frozen_teachers(job.distiller))
    return {
        "steps": job.run.step,
        "seconds": time.perf_counter() - began,
        "peak_memory": memory.peak(),
        "metrics": runner.keeper.latest,
        "guards": job.distiller.guards.as_dict(),
    }


def make_runner(job: Fit) -> _KDRunner:
    """mmengine's Runner for a job, with its optimisers, schedules and hooks; ``train()`` runs it."""
    run, train = job.run, job.train
    run.steps_per_epoch = run.order.steps_per_epoch
    run.total_steps = train.steps or (train.epochs or 1) * run.steps_per_epoch
    job.distiller.accumulate = train.accumulate
    sampler = StepSampler(run.order, parallel.rank(), parallel.world())
    sampler.end = min(run.steps_per_epoch, run.total_steps)
    keeper = StateHook(job)
    runner = _KDRunner(
        model=job.distiller,
        work_dir=str(job.folder / "engine"),
        train_dataloader=job.source.train_loader(sampler),
        train_cfg={"type": _StepLoop, "max_epochs": -(-run.total_steps // run.steps_per_epoch)},
        optim_wrapper=_wrapper(job, train),
        param_scheduler=_schedulers(train, run.total_steps) or None,
        default_hooks={
            "runtime_info": None,
            "timer": None,
            "logger": None,
            "checkpoint": None,
            "sampler_seed": None,
        },
        custom_hooks=[MetricsHook(job), keeper],
        visualizer={"type": "Visualizer", "vis_backends": [{"type": name} for name in job.visualizers]},
        log_level="ERROR",
        experiment_name=f"kd-{next(_serial)}",
        cfg={},
    )
    runner.job, runner.sampler, runner.keeper = job, sampler, keeper  # mmengine deep-copies its configs
    return runner


class _KDRunner(Runner):
    """mmengine's Runner without what would slow a small run or leave the process changed."""

    keeper: StateHook
    job: Fit
    sampler: StepSampler

    def _log_env(self, env_cfg: dict[str, Any]) -> None:  # collecting it starts compilers and takes a second
        pass

    def dump_config(self) -> None:  # the run folder holds the recipe
        pass

    def set_randomness(self, *args: Any, **kwargs: Any) -> None:  # every step seeds itself
        self._seed = 0
        self._deterministic = False

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        self._timestamp = time.strftime("%Y%m%d_%H%M%S")

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        return model  # placed already; gradients are summed over ranks by the step itself

    def load_or_resume(self) -> None:
        """mmengine calls this after the optimisers and schedulers are built: the place to restore into them."""
        if not self._has_loaded:
            self.keeper.restore(self)
            self._has_loaded = True


class _StepLoop(EpochBasedTrainLoop):  # type: ignore[misc]
    """Epochs that can begin in the middle and end at a number of steps."""

    def __init__(self, runner: _KDRunner, dataloader: Any, max_epochs: int) -> None:
        logger = logging.getLogger("mmengine")
        level, logger.level = logger.level, logging.ERROR  # it warns that a data set has no metainfo
        super().__init__(runner, dataloader, max_epochs, val_interval=max_epochs + 1)
        logger.level = level
        self.job, self.sampler = runner.job, runner.sampler
        self._max_iters = self.job.run.total_steps

    def run_epoch(self) -> None:
        run = self.job.run
        first = self._epoch * run.steps_per_epoch
        run.order.begin_epoch(self._epoch)
        self.sampler.start = self._iter
        self.sampler.end = min(first + run.steps_per_epoch, run.total_steps)
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        if self._iter == first:
            run.reseed("epoch", self._epoch)
            self.job.distiller.events.on_epoch(epoch=self._epoch)
        for batch in self.dataloader if len(self.sampler) else ():
            self.run_iter(self._iter - first, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


class _Autocast(OptimWrapper):  # type: ignore[misc]
    """bf16 autocast on any device; mmengine's own wrapper insists on an accelerator."""

    def __init__(self, device: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.device = device

    def optim_context(self, model: nn.Module) -> Any:
        return torch.autocast(self.device, torch.bfloat16)


class MetricsHook(Hook):  # type: ignore[misc]
    """Terms and evaluations to metrics.jsonl, the visualizers and the progress bar."""

    priority = "LOW"

    def __init__(self, job: Fit) -> None:
        self.job = job
        self.extra: dict[str, Any] = {}

    def before_train(self, runner: Runner) -> None:
        self.job.run.log = lambda **values: self.extra.update(values)

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        step = self.job.run.step
        if step % LOG_STEPS == 0 or step == 1 or step == self.job.run.total_steps:
            check_finite(outputs, step)
            values = {name: float(value) for name, value in outputs.items()}
            self._write(runner, {"step": step, **values, "lr": _lr(runner), **self.extra})
            self.extra.clear()
        self.job.progress.advance(step)

    def after_train_epoch(self, runner: Runner) -> None:
        """Evaluate where it is due; at the end put the best weights back, ``finish`` on those, and judge them."""
        job, keeper = self.job, runner.keeper
        best, last = job.train.keep == "best", job.run.step >= job.run.total_steps
        finishing = last and bool(job.distiller.events.finish.get_hookimpls())
        due = best or not finishing if last else (runner.epoch + 1) % job.train.eval_every == 0
        if due:
            keeper.judge(self._evaluate(runner))
        if last:
            keeper.settle()
        if finishing:
            job.run.reseed("finish")
            job.distiller.events.finish()
            keeper.latest = self._evaluate(runner)

    def _evaluate(self, runner: Runner) -> dict[str, float]:
        self.job.distiller.events.before_eval()
        metrics = self.job.evaluate()
        self._write(runner, {"step": self.job.run.step, **{f"val/{k}": v for k, v in metrics.items()}})
        self.job.progress.note(metrics)
        return metrics

    def _write(self, runner: Runner, row: dict[str, Any]) -> None:
        if parallel.rank():
            return
        try:
            with self.job.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise RunError(f"{self.job.metrics_file}: cannot be written: {error.strerror}") from error
        if self.job.visualizers:
            step = row["step"]
            runner.visualizer.add_scalars({k: v for k, v in row.items() if isinstance(v, float)}, step=step)


class StateHook(Hook):  # type: ignore[misc]
    """The run's state: saved whole, restored exactly, and on a signal saved before leaving."""

    priority = "VERY_LOW"

    def __init__(self, job: Fit) -> None:
        self.job = job
        self.last_saved = time.monotonic()
        self.latest: dict[str, float] = {}
        self.best: dict[str, Any] = {}

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        every, step = self.job.train.checkpoint_every, self.job.run.step
        stop = Stop.requested()
        due = step % every == 0 if every else time.monotonic() - self.last_saved > SAVE_SECONDS
        if parallel.world() > 1:  # one rank's clock or signal decides for all
            flags = parallel.total(bool(stop)), parallel.total(due)
            stop, due = stop or ("another rank" if flags[0] else ""), bool(flags[1])
        if due or stop:
            self.save(runner)
        if stop:
            raise Interrupted(
                f"stopped by {stop} at step {step} of {self.job.run.total_steps}; the state is saved"
            )

    def save(self, runner: Runner) -> None:
        """Write step-N.state beside the older ones, then drop all but the newest few."""
        self.last_saved = time.monotonic()
        if parallel.rank():
            return
        job = self.job
        metrics = job.metrics_file
        state = {
            "identity": job.identity,
            "world": parallel.world(),
            "model": job.distiller.state_dict(),
            "optimizer": runner.optim_wrapper.state_dict(),
            "schedulers": [s.state_dict() for s in runner.param_schedulers or []],
            "run": job.run.state_dict(),
            "epoch": runner.epoch,
            "guards": job.distiller.guards.as_dict(),
            "metrics_bytes": metrics.stat().st_size if metrics.exists() else 0,
            "latest": self.latest,
            "best": self.best,
        }
        save_state(job.states / f"step-{job.run.step:09d}.state", state)
        for old in sorted(job.states.glob("step-*.state"))[:-KEEP_STATES]:
            old.unlink(missing_ok=True)

    def restore(self, runner: Runner) -> None:
        job = self.job
        found = newest_state(job.states, job.progress.say)
        if found is None:
            if job.metrics_file.exists() and not parallel.rank():
                job.metrics_file.unlink()  # the lines of a run that was killed before its first state
            return
        path, state = found
        if state["identity"] != job.identity:
            raise InputError(
                str(path),
                "this state belongs to another recipe",
                hint="use another --out, or --resume=force to go on",
            )
        job.distiller.load_state_dict(state["model"])
        runner.optim_wrapper.load_state_dict(state["optimizer"])
        for scheduler, value in zip(runner.param_schedulers or [], state["schedulers"], strict=True):
            scheduler.load_state_dict(value)
        job.run.load_state_dict(state["run"])
        job.distiller.guards.load(state["guards"])
        self.latest, self.best = state["latest"], state["best"]
        runner.train_loop._epoch, runner.train_loop._iter = state["epoch"], job.run.step
        if not parallel.rank() and job.metrics_file.exists():
            with job.metrics_file.open("r+b") as file:
                file.truncate(state["metrics_bytes"])
        job.progress.say(f"resumed at step {job.run.step} of {job.run.total_steps}")
        job.distiller.guards.remember(_frozen_teachers(job.distiller))

    def judge(self, metrics: dict[str, float]) -> None:
        """Keep the latest evaluation, and with keep = "best" the weights of the best one (the first of equals)."""
        self.latest = metrics
        if self.job.train.keep != "best" or not metrics:
            return
        name, value = next(iter(metrics.items()))
        sign = 1 if higher_is_better(name) else -1
        if not self.best or sign * value > sign * self.best["metrics"][name]:
            self.best = {"step": self.job.run.step, "metrics": dict(metrics)}
            if not parallel.rank():
                save_tensors(self.job.folder / "best.safetensors", self.job.distiller.student.state_dict())

    def settle(self) -> None:
        """The best weights back into the student, where they were asked for."""
        if self.best:
            parallel.barrier()
            weights = load_tensors(self.job.folder / "best.safetensors", "train.keep")
            self.job.distiller.student.load_state_dict(weights)
            self.latest = dict(self.best["metrics"])


def _wrapper(job: Fit, train: TrainTable) -> OptimWrapper:
    params = trainable(job.distiller)
    if not params:
        raise InputError("student.train", "nothing is left to train")
    job.run.optimizers = own_optimizers(job.distiller.parts, job.optimizer_tables)
    options: dict[str, Any] = {"optimizer": job.make_optimizer(params)}
    if train.clip is not None:
        options["clip_grad"] = {"max_norm": train.clip}
    device = job.run.device.type
    if train.precision == "bf16":
        return _Autocast(device, **options)
    if train.precision == "fp16":
        if device != "cuda":
            raise InputError(
                "train.precision", "fp16 training needs a GPU", given="fp16", allowed="fp32, bf16 on a CPU"
            )
        return AmpOptimWrapper(dtype="float16", **options)
    return OptimWrapper(**options)


def _schedulers(train: TrainTable, steps: int) -> list[dict[str, Any]]:
    """mmengine's schedulers, by step: an optional linear warm-up, then constant, cosine or linear to zero.

    mmengine's LinearLR arrives one step before its ``end``, hence the ones that are added.
    """
    warm = round(train.schedule.warmup * steps)
    found: list[dict[str, Any]] = []
    if warm:
        found.append({"type": "LinearLR", "start_factor": 1 / (warm + 1), "begin": 0, "end": warm + 1})
    main: dict[str, Any] = {"begin": warm, "end": steps + 1}
    if train.schedule.use == "cosine":
        found.append({"type": "CosineAnnealingLR", "T_max": max(steps - warm, 1), **main})
    if train.schedule.use == "linear":
        found.append({"type": "LinearLR", "start_factor": 1.0, "end_factor": 0.0, **main})
    return [{**each, "by_epoch": False} for each in found]


def _frozen_teachers(distiller: Distiller) -> dict[str, nn.Module]:
    return {name: teacher for name, teacher in distiller.teachers.items() if not teacher.saved}


def _lr(runner: Runner) -> float:
    return float(runner.optim_wrapper.optimizer.param_groups[0]["lr"])


def _close(runner: Runner) -> None:
    """mmengine keeps every logger and visualizer by name for ever; a session of many runs must not."""
    with nullcontext():
        for handler in list(runner.logger.handlers):
            handler.close()
            runner.logger.removeHandler(handler)
    for owner in (type(runner.logger), type(runner.visualizer), type(runner.message_hub)):
        getattr(owner, "_instance_dict", {}).pop(runner.experiment_name, None)
