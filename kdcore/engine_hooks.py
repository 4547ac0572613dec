"""Hooks of a training: metrics as JSON lines, and the state that a resumed run goes on from."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import Runner

from kdcore import parallel
from kdcore.checkpoint import load_tensors, newest_state, save_state, save_tensors, writing
from kdcore.distill import Distiller
from kdcore.errors import InputError, Interrupted, blame
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
    train: TrainTable
    folder: Path
    evaluate: Callable[[], dict[str, float]]
    identity: str = ""
    force: bool = False
    title: str = "train"
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

    def after_train_iter(self, runner: Runner, outputs: Any, **_: Any) -> None:
        step = self.job.run.step
        if step % LOG_STEPS == 0 or step == 1 or step == self.job.run.total_steps:
            check_finite(outputs, step, self.job.title)
            values = {name: parallel.total(value, value.device) for name, value in outputs.items()}
            lr = float(runner.optim_wrapper.optimizer.param_groups[0]["lr"])
            self._write(runner, {"step": step, **values, "lr": lr, **self.extra})
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
        path = self.job.metrics_file
        with writing(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        if self.job.run.recipe.report.visualizers:
            scalars = {name: value for name, value in row.items() if isinstance(value, float)}
            runner.visualizer.add_scalars(scalars, step=row["step"])


class StateHook(Hook):
    """The run's state: saved whole, restored exactly, and on a signal saved before leaving."""

    priority = "VERY_LOW"

    def __init__(self, job: Fit) -> None:
        self.job = job
        self.last_saved = time.monotonic()
        self.began = time.perf_counter()  # of all legs of the training: a resume puts it back
        self.latest: dict[str, float] = {}
        self.best: dict[str, Any] = {}

    def after_train_iter(self, runner: Runner, **_: Any) -> None:
        every, step, stop = self.job.train.checkpoint_every, self.job.run.step, Stop.requested()
        due = step % every == 0 if every else time.monotonic() - self.last_saved > SAVE_SECONDS
        if parallel.world() > 1:  # one rank's clock or signal decides for all
            flags = parallel.total(bool(stop)), parallel.total(due)
            stop, due = stop or ("another rank" if flags[0] else ""), bool(flags[1])
        if due or stop:
            self.save(runner)
        if stop:
            total = self.job.run.total_steps
            raise Interrupted(f"stopped by {stop} at step {step} of {total}; the state is saved")

    @property
    def seconds(self) -> float:
        """How long it has been trained, over all its legs; what a killed one did after its last state does not count."""
        return time.perf_counter() - self.began

    def save(self, runner: Runner) -> None:
        """Write step-N.state beside the older ones, then drop all but the newest few."""
        self.last_saved = time.monotonic()
        job = self.job
        state = {name: each.state_dict() for name, each in self._stateful(runner).items()}  # by all processes
        if parallel.rank():
            return
        state |= {
            "identity": job.identity,
            "epoch": runner.epoch,
            "guards": job.distiller.guards.as_dict(),
            "metrics_bytes": job.metrics_file.stat().st_size if job.metrics_file.exists() else 0,
            "seconds": self.seconds,
            "latest": self.latest,
            "best": self.best,
        }
        save_state(job.states / f"step-{job.run.step:09d}.state", state)
        for old in sorted(job.states.glob("step-*.state"))[:-KEEP_STATES]:
            old.unlink(missing_ok=True)

    def restore(self, runner: Runner) -> None:
        """Go on from the newest whole state that is there. Raises InputError where it is of another recipe."""
        job = self.job
        path, state = newest_state(job.states, job.progress.say) or (job.states, {})
        if state and state["identity"] != job.identity and not job.force:
            problem, hint = "this state belongs to another recipe", "use another --out, or --force to go on"
            raise InputError(str(path), problem, hint=hint)
        if state:
            with blame(str(path), "this state does not fit the recipe", hint="name another --out"):
                self._put_back(runner, state)  # forced, or written by something else: it may be any
            if job.run.step > job.run.total_steps:
                problem = (
                    f"this state is at step {job.run.step}, and the recipe ends at {job.run.total_steps}"
                )
                raise InputError(str(path), problem, hint="train longer, or name another --out")
            job.progress.say(f"resumed at step {job.run.step} of {job.run.total_steps}")
        if not parallel.rank():
            self._clean_up(state.get("metrics_bytes", 0))

    def _clean_up(self, metrics_bytes: int) -> None:
        """Away with the drafts of a process that was killed while it wrote, and the metrics after its last state."""
        for draft in self.job.folder.rglob(".*.tmp"):
            draft.unlink(missing_ok=True)
        if self.job.metrics_file.exists():
            with writing(self.job.metrics_file):
                os.truncate(self.job.metrics_file, metrics_bytes)

    def _stateful(self, runner: Runner) -> dict[str, Any]:
        """What has a ``state_dict`` of its own, by its name in the file."""
        schedulers = {f"scheduler.{i}": each for i, each in enumerate(runner.param_schedulers or [])}
        run = self.job.run
        return {"model": self.job.distiller, "optimizer": runner.optim_wrapper, "run": run, **schedulers}

    def _put_back(self, runner: Runner, state: dict[str, Any]) -> None:
        job = self.job
        for name, each in self._stateful(runner).items():
            each.load_state_dict(state[name])
        job.distiller.guards.load(state["guards"])
        self.latest, self.best = state["latest"], state["best"]
        self.began -= state.get("seconds", 0.0)
        runner.train_loop._epoch, runner.train_loop._iter = state["epoch"], job.run.step

    def judge(self, metrics: dict[str, float]) -> None:
        """Keep the latest evaluation, and with keep = "best" the weights of the best one (the first of equals)."""
        self.latest = metrics
        if self.job.train.keep != "best" or not metrics:
            return
        name, value = next(iter(metrics.items()))
        sign = 1 if higher_is_better(name) else -1
        if not self.best or sign * value > sign * self.best["metrics"][name]:
            self.best = {"step": self.job.run.step, "metrics": dict(metrics)}
            weights = self.job.distiller.student.state_dict()
            if not parallel.rank():
                save_tensors(self.job.folder / "best.safetensors", weights)

    def settle(self) -> None:
        """The best weights back into the student, where they were asked for."""
        if self.best:
            parallel.barrier()
            weights = load_tensors(self.job.folder / "best.safetensors", "train.keep")
            self.job.distiller.student.load_state_dict(weights)
            self.latest = dict(self.best["metrics"])
