"""The engine: mmengine's Runner, its hooks, optimiser wrappers, schedulers and visualizers.

What the Runner lacks is in ``engine_hooks``: exact resume in the middle of an epoch, states written whole,
leaving on a signal, metrics as JSON lines that a resume neither doubles nor drops.
"""

from __future__ import annotations

import itertools
import logging
import time
from typing import Any

import torch
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from kdcore import memory, parallel, sharding
from kdcore.engine_hooks import Fit, MetricsHook, StateHook, frozen_teachers
from kdcore.errors import InputError
from kdcore.optimizers import optimizer_of, own_optimizers, trainable
from kdcore.order import Order, StepSampler
from kdcore.tables import TrainTable

__all__ = ["Fit", "fit", "make_runner"]

_serial = itertools.count()


def fit(job: Fit) -> dict[str, Any]:
    """Train until the last step; resumes from the newest whole state in the job's folder, if there is one.

    Returns seconds and peak memory in bytes (of this process), steps, the metrics of the last (or best)
    evaluation, and guards.
    """
    runner = make_runner(job)
    memory.reset_peak()
    began = time.perf_counter()
    job.distiller.guards.remember(frozen_teachers(job.distiller))
    try:
        with job.progress.task(job.title, job.run.total_steps):
            runner.train()
    finally:
        _close(runner)
    job.distiller.guards.unchanged(frozen_teachers(job.distiller))
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
    _check_shares(run.order, train)
    sampler = StepSampler(run.order, parallel.rank(), parallel.world())
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


def _check_shares(order: Order, train: TrainTable) -> None:
    """Every process has a sample of every batch; under fsdp all cut theirs into as many micro-batches."""
    world, least = parallel.world(), train.accumulate if train.strategy == "fsdp" else 1
    for stream, size in order.batch_sizes.items():
        ends = stream == order.epoch_stream
        smallest = min(size, order.sizes[stream] % size or size) if ends else size
        if world > 1 and smallest // world < least:
            problem = (
                f"a batch of {smallest} of {order.sizes[stream]} samples is too small for {world} processes"
            )
            hint = f"a size that leaves none at the end, or at least {least * world}"
            raise InputError("data.batch_size", problem, given=size, hint=hint)


class _KDRunner(Runner):
    """mmengine's Runner without what would slow a small run or leave the process changed."""

    keeper: StateHook
    _has_loaded: bool
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


class _StepLoop(EpochBasedTrainLoop):
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
        self.sampler.steps = range(self._iter, min(first + run.steps_per_epoch, run.total_steps))
        self.runner.call_hook("before_train_epoch")
        self.runner.model.train()
        if self._iter == first:
            run.reseed("epoch", self._epoch)
            self.job.distiller.events.on_epoch(epoch=self._epoch)
        for batch in self.dataloader if len(self.sampler) else ():
            self.run_iter(self._iter - first, batch)
        self.runner.call_hook("after_train_epoch")
        self._epoch += 1


class _Autocast(OptimWrapper):
    """bf16 autocast on any device; mmengine's own wrapper insists on an accelerator."""

    def __init__(self, device: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.device = device

    def optim_context(self, model: nn.Module) -> Any:
        return torch.autocast(self.device, torch.bfloat16)


def _wrapper(job: Fit, train: TrainTable) -> OptimWrapper:
    sharding.rest([job.distiller.student])  # the optimiser steps the pieces
    parts, recipe = job.distiller.parts, job.run.recipe
    groups = _groups(job, train, trainable(parts))
    job.run.optimizers = own_optimizers(parts, recipe)
    options: dict[str, Any] = {"optimizer": optimizer_of(train.optimizer, groups, "train.optimizer")}
    if train.clip is not None:
        options["clip_grad"] = {"max_norm": train.clip}
    device = job.run.device.type
    if train.precision == "fp16":
        return AmpOptimWrapper(dtype="float16", **options)
    wrapper = _Autocast(device, **options) if train.precision == "bf16" else OptimWrapper(**options)
    if train.strategy == "fsdp":
        wrapper.clip_func = parallel.clip_norm
    return wrapper


def _groups(job: Fit, train: TrainTable, params: list[nn.Parameter]) -> list[Any]:
    """Under fsdp what is sharded apart from the rest: torch's optimisers mix no two kinds of tensor in a group.

    Cut by what would be sharded, not by what is, so that another number of processes can resume.
    """
    if train.strategy != "fsdp":
        return params
    mine = {id(p) for p in job.distiller.student.parameters() if p.dim()}
    groups = [[p for p in params if id(p) in mine], [p for p in params if id(p) not in mine]]
    return [{"params": group} for group in groups if group]


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
