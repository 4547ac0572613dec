"""Hooks of a training: metrics as JSON lines, and the state that a resumed run goes on from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn

from kdcore import parallel, sharding
from kdcore.checkpoint import load_tensors, newest_state, save_state, save_tensors
from kdcore.data import Source
from kdcore.distill import Distiller
from kdcore.errors import InputError, Interrupted, KDError, RunError, cause
from kdcore.guards import check_finite
from kdcore.progress import Progress
from kdcore.signals import Stop
from kdcore.tables import TrainTable
from kdcore.task import higher_is_better

SAVE_SECONDS = 30.0
KEEP_STATES = 2
LOG_STEPS = 10


@dataclass
class Fit:
    """One training, ready to run: a prepared distiller and everything that decides its bits."""

    distiller: Distiller
    source: Source
    train: TrainTable
    folder: Path
    evaluate: Callable[[], dict[str, float]]
    identity: str = ""
    force: bool = False
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


class MetricsHook(Hook):
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
            values = {name: parallel.total(value, value.device) for name, value in outputs.items()}
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


class StateHook(Hook):
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
        job = self.job
        model = parallel.whole(job.distiller.state_dict())
        optimizer = parallel.whole(runner.optim_wrapper.state_dict())
        if parallel.rank():
            return
        metrics = job.metrics_file
        state = {
            "identity": job.identity,
            "world": parallel.world(),
            "model": model,
            "optimizer": optimizer,
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
        for draft in () if parallel.rank() else job.folder.rglob(".*.tmp"):
            draft.unlink(missing_ok=True)  # of a process that was killed while it wrote
        found = newest_state(job.states, job.progress.say)
        if found is None:
            if job.metrics_file.exists() and not parallel.rank():
                job.metrics_file.unlink()  # the lines of a run that was killed before its first state
            return
        path, state = found
        if state["identity"] != job.identity and not job.force:
            problem, hint = "this state belongs to another recipe", "use another --out, or --force to go on"
            raise InputError(str(path), problem, hint=hint)
        try:
            self._put_back(runner, state)
        except KDError:
            raise
        except (
            Exception
        ) as error:  # of another architecture or optimiser: forced, or written by something else
            problem, hint = f"this state does not fit the recipe: {cause(error)}", "name another --out"
            raise InputError(str(path), problem, hint=hint) from error
        job.progress.say(f"resumed at step {job.run.step} of {job.run.total_steps}")
        job.distiller.guards.remember(frozen_teachers(job.distiller))

    def _put_back(self, runner: Runner, state: dict[str, Any]) -> None:
        job = self.job
        job.distiller.load_state_dict(parallel.pieces(state["model"], job.distiller.state_dict()))
        runner.optim_wrapper.load_state_dict(_spread(state["optimizer"], runner.optim_wrapper.optimizer))
        for scheduler, value in zip(runner.param_schedulers or [], state["schedulers"], strict=True):
            scheduler.load_state_dict(value)
        job.run.load_state_dict(state["run"])
        job.distiller.guards.load(state["guards"])
        self.latest, self.best = state["latest"], state["best"]
        runner.train_loop._epoch, runner.train_loop._iter = state["epoch"], job.run.step
        if not parallel.rank() and job.metrics_file.exists():
            try:
                os.truncate(job.metrics_file, state["metrics_bytes"])
            except OSError as error:
                raise RunError(f"{job.metrics_file}: cannot be written: {error.strerror}") from error

    def judge(self, metrics: dict[str, float]) -> None:
        """Keep the latest evaluation, and with keep = "best" the weights of the best one (the first of equals)."""
        self.latest = metrics
        if self.job.train.keep != "best" or not metrics:
            return
        name, value = next(iter(metrics.items()))
        sign = 1 if higher_is_better(name) else -1
        if not self.best or sign * value > sign * self.best["metrics"][name]:
            self.best = {"step": self.job.run.step, "metrics": dict(metrics)}
            weights = parallel.whole(self.job.distiller.student.state_dict())
            if not parallel.rank():
                save_tensors(self.job.folder / "best.safetensors", weights)

    def settle(self) -> None:
        """The best weights back into the student, where they were asked for."""
        if self.best:
            parallel.barrier()
            student = self.job.distiller.student
            weights = load_tensors(self.job.folder / "best.safetensors", "train.keep")
            student.load_state_dict(parallel.pieces(weights, student.state_dict()))
            self.latest = dict(self.best["metrics"])


def frozen_teachers(distiller: Distiller) -> dict[str, nn.Module]:
    sharding.rest(distiller.teachers.values())  # version counters are those of the pieces
    return {name: teacher for name, teacher in distiller.teachers.items() if not teacher.saved}


def _spread(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's whole state in the pieces of its parameters."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    found = {i: parallel.pieces(each, dict.fromkeys(each, params[i])) for i, each in state["state"].items()}
    return {**state, "state": found}


def _lr(runner: Runner) -> float:
    return float(runner.optim_wrapper.optimizer.param_groups[0]["lr"])
