"""The engine: mmengine's Runner, its hooks, optimiser wrappers, schedulers and visualizers.

What the Runner lacks is in ``engine_hooks``: exact resume in the middle of an epoch, states written whole,
leaving on a signal, metrics as JSON lines that a resume neither doubles nor drops.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from kdcore import memory, parallel
from kdcore.engine_hooks import Fit, MetricsHook, StateHook
from kdcore.errors import InputError, RunError
from kdcore.optimizers import optimizer_of, own_optimizers, trainable
from kdcore.order import StepSampler
from kdcore.tables import TrainTable

__all__ = ["Fit", "fit", "make_runner"]

_serial = itertools.count()


def fit(job: Fit) -> dict[str, Any]:
    """Train until the last step; resumes from the newest whole state in the job's folder, if there is one.

    Returns seconds and peak memory in bytes (of this process), steps, the metrics of the last (or best)
    evaluation, and guards.
    """
    runner, distiller = make_runner(job), job.distiller
    frozen = {name: teacher for name, teacher in distiller.teachers.items() if not teacher.saved}
    memory.reset_peak()
    distiller.guards.remember(frozen)
    try:
        with job.progress.task(job.title, job.run.total_steps):
            runner.train()
    finally:
        _close(runner)
    distiller.eval()
    distiller.guards.unchanged(frozen)
    if job.train.strategy == "fsdp":
        from kdcore import sharding

        sharding.restored(distiller.student)
    return {
        "steps": job.run.step,
        "seconds": runner.keeper.seconds,
        "peak_memory": memory.peak(),
        "metrics": runner.keeper.latest,
        "guards": distiller.guards.as_dict(),
    }


def make_runner(job: Fit) -> _KDRunner:
    """mmengine's Runner for a job, with its optimisers, schedules and hooks; ``train()`` runs it."""
    run, train = job.run, job.train
    run.steps_per_epoch = run.order.steps_per_epoch
    run.total_steps = train.steps or (train.epochs or 1) * run.steps_per_epoch
    _check_shares(job)
    sampler = StepSampler(run.order, parallel.rank(), parallel.world())
    keeper = StateHook(job)
    unused = ("runtime_info", "timer", "logger", "checkpoint", "sampler_seed")
    runner = _KDRunner(
        model=job.distiller,
        work_dir=str(job.folder / "engine"),
        train_dataloader=run.source.train_loader(sampler),
        train_cfg={"type": _StepLoop, "max_epochs": -(-run.total_steps // run.steps_per_epoch)},
        optim_wrapper=_wrapper(job),
        param_scheduler=_schedulers(train, run.total_steps) or None,
        default_hooks=dict.fromkeys(unused),
        custom_hooks=[MetricsHook(job), keeper],
        visualizer={
            "type": "Visualizer",
            "vis_backends": [{"type": name} for name in run.recipe.report.visualizers],
        },
        log_level="ERROR",
        experiment_name=f"kd-{next(_serial)}",
        cfg={},
    )
    runner.job, runner.keeper = job, keeper  # mmengine deep-copies its configs
    return runner


def _check_shares(job: Fit) -> None:
    """Every process has a sample of every batch; under fsdp all cut theirs into as many micro-batches."""
    order, world = job.run.order, parallel.world()
    least = job.train.accumulate if job.train.strategy == "fsdp" else 1
    for stream, size in order.batch_sizes.items() if world > 1 else ():
        count = order.sizes[stream]
        smallest = min(size, count % size or size) if stream == order.epoch_stream else size
        if smallest // world < least:
            problem = f"a batch of {smallest} of {count} samples is too small for {world} processes"
            hint = f"a size that leaves none at the end, or at least {least * world}"
            raise InputError("data.batch_size", problem, given=size, hint=hint)


class _KDRunner(Runner):
    """mmengine's Runner without what would slow a small run or leave the process changed."""

    job: Fit
    keeper: StateHook
    _has_loaded: bool

    def _log_env(self, env_cfg: dict[str, Any]) -> None:
        """Nothing: to collect it starts compilers and takes a second."""

    def dump_config(self) -> None:
        """Nothing: the run folder holds the recipe."""

    def set_randomness(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: every step seeds itself."""
        self._seed, self._deterministic = 0, False

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """Nothing: processes are grouped by ``kdcore.parallel``, and start as they are."""
        self._timestamp = time.strftime("%Y%m%d_%H%M%S")

    def wrap_model(self, model_wrapper_cfg: Any, model: nn.Module) -> nn.Module:
        """As it is: it is placed already, and the step itself sums gradients over ranks."""
        return model

    def load_or_resume(self) -> None:
        """mmengine calls this after the optimisers and schedulers are built: the place to restore into them."""
        if not self._has_loaded:
            self.keeper.restore(self)
            self._has_loaded = True


class _StepLoop(EpochBasedTrainLoop):
    """Epochs that can begin in the middle and end at a number of steps."""

    def __init__(self, runner: _KDRunner, dataloader: Any, max_epochs: int) -> None:
        dataloader.dataset.metainfo = None  # where there is none, it warns
        super().__init__(runner, dataloader, max_epochs)

    def run_epoch(self) -> None:
        distiller, loader = self.runner.job.distiller, self.dataloader
        run, first = distiller.run, self._epoch * distiller.run.steps_per_epoch
        run.order.begin_epoch(self._epoch)
        steps = range(self._iter, min(first + run.steps_per_epoch, run.total_steps))
        loader.batch_sampler.steps = steps
        self.runner.call_hook("before_train_epoch")
        distiller.train()
        if self._iter == first:
            run.reseed("epoch", self._epoch)
            distiller.events.on_epoch(epoch=self._epoch)
        for batch in loader if steps else ():
            if isinstance(batch, RunError):  # a worker process hands on what it failed with
                raise batch
            self.run_iter(self._iter - first, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


def _wrapper(job: Fit) -> OptimWrapper:
    """mmengine's wrapper of the run's optimiser: precision and clipping. Components' own optimisers go to the run."""
    train, parts = job.train, job.distiller.parts
    params: list[Any] = trainable(parts)
    job.run.optimizers = own_optimizers(parts, job.run.recipe)
    if train.strategy == "fsdp":
        from kdcore import sharding

        params = sharding.groups(parts.student, params)
    options: dict[str, Any] = {"optimizer": optimizer_of(train.optimizer, params, "train.optimizer")}
    if train.clip is not None:
        options["clip_grad"] = {"max_norm": train.clip}
    if train.precision == "fp16":
        return AmpOptimWrapper(dtype="float16", **options)
    wrapper = OptimWrapper(**options)
    if train.precision == "bf16":  # mmengine's own autocast refuses a CPU
        wrapper.optim_context = lambda model: torch.autocast(job.run.device.type, torch.bfloat16)
    return sharding.adapt(wrapper) if train.strategy == "fsdp" else wrapper


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


def _close(runner: Runner) -> None:
    """mmengine keeps every logger and visualizer by name for ever; a session of many runs must not."""
    for handler in list(runner.logger.handlers):
        handler.close()
        runner.logger.removeHandler(handler)
    for owner in (type(runner.logger), type(runner.visualizer), type(runner.message_hub)):
        getattr(owner, "_instance_dict", {}).pop(runner.experiment_name, None)
