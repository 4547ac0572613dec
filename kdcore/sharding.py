"""Models sharded over processes (FSDP): parameters, gradients and optimiser state in pieces, one a process.

Imported only where a recipe asks for it (``train.strategy = "fsdp"``, ``teacher.NAME.shard``): ``ShardedDistiller``
is the step with what pieces change in it; ``groups`` and ``adapt`` are for the optimiser. torch's ``fully_shard`` does
the work: mmengine's FSDPStrategy is built on torch's older FullyShardedDataParallel, which refuses a machine without
an accelerator, averages gradients (here every term is divided by its global count, so they are summed), and holds
one forward a step. A sharded model is what it was to everybody else: the same object, called the same way, its
state whole; only its parameters are DTensors between steps. ``restored`` makes it a plain module again.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from kdcore import parallel
from kdcore.distill import Distiller
from kdcore.errors import InputError, KDError
from kdcore.kinds import Router
from kdcore.parts import Parts
from kdcore.tables import TrainTable
from kdcore.terms import Pass
from kdcore.types import Batch, Outputs

UNIT = 2**16  # parameters: a smaller element of a list of layers is gathered with its parent


class ShardedDistiller(Distiller):
    """The step with the student in pieces under ``fsdp`` (and teachers made of it), and the teachers named.

    Raises InputError where something in the recipe needs a model's parameters whole.
    """

    def __init__(self, parts: Parts, train: TrainTable, teachers: Iterable[str]) -> None:
        super().__init__(parts)
        _check(parts, train, teachers)
        self.sharded: list[nn.Module] = [parts.teachers[name] for name in teachers]
        if train.strategy == "fsdp":
            made = [t for t in parts.teachers.values() if t.saved and t not in self.sharded]
            self.sharded = [parts.student, *made, *self.sharded]

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Several processes shard the models on their way to the device."""
        for model in self.sharded if parallel.world() > 1 else ():
            shard(model, torch.device(args[0]))
        return super().to(*args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        """What was gathered for an evaluation is freed: who takes parameters now, takes the pieces."""
        _rest(self.sharded)
        return super().train(mode)

    def ask(self, name: str, batch: Batch, *args: Any, **kwargs: Any) -> Outputs:
        model, taps = (self.student if name == "student" else self.teachers[name]), self.parts.taps.get(name)
        if not isinstance(model, FSDPModule):
            return super().ask(name, batch, *args, **kwargs)
        outputs = super().ask(
            name, batch, *args, **{**kwargs, "stop": False}
        )  # torch's hooks after it must run
        if taps is not None:
            _cover(model, {path: outputs[path] for path in taps.names if path in outputs})
        return outputs

    def forward(self, batch: Batch) -> Tensor:
        if isinstance(self.student, FSDPModule):
            raise KDError("run.objective puts tensors in the place of parameters, which fsdp does not allow")
        return super().forward(batch)

    def _look(self, now: Pass) -> None:
        """Guards ask for gradients before the backward: what was gathered stays so, and nothing is summed."""
        self._end_backward(False)
        try:
            super()._look(now)
        finally:
            self._end_backward(True)

    def _end_backward(self, whole: bool) -> None:
        if isinstance(self.student, FSDPModule):
            self.student.set_requires_gradient_sync(whole)
            self.student.set_reshard_after_backward(whole)

    def _trained(self, optim_wrapper: Any) -> list[nn.Parameter]:
        """Without the sharded ones: their gradients are summed over processes already."""
        return [p for p in super()._trained(optim_wrapper) if not isinstance(p, DTensor)]

    def _after(self, batch: Batch, passes: Sequence[Pass]) -> None:
        _rest(self.sharded)  # events see the parameters as they are between steps
        super()._after(batch, passes)


def _check(parts: Parts, train: TrainTable, teachers: Iterable[str]) -> None:
    """Raise InputError where something in the recipe needs a model's parameters whole."""
    for name, component in parts.components() if train.strategy == "fsdp" else ():
        reasons = {
            f"fsdp trains with one optimiser, and {name} steps its own": component.own_optimizer is not None,
            f"fsdp holds gradients in pieces, and {name} merges them whole": hasattr(component, "merge"),
        }
        for problem in (problem for problem, found in reasons.items() if found):
            hint = 'take train.strategy out: "replicate" does all of this'
            raise InputError("train.strategy", problem, given="fsdp", hint=hint)
    if train.strategy == "fsdp" and train.precision == "fp16":
        allowed = "fp32, bf16"
        raise InputError("train.precision", "fsdp has no loss scaling here", given="fp16", allowed=allowed)
    planned = parts.router is not None and type(parts.router).plan is not Router.plan
    for name in teachers:
        if planned and name in parts.routed:
            problem = "the router plans which teachers run, so processes would wait for each other's pieces"
            hint = "leave this teacher replicated"
            raise InputError(f"teacher.{name}.shard", problem, given=True, hint=hint)


# ---- pieces, and a whole of them -----------------------------------------------------------------------


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard in place, layer by layer: each element of a list of layers with UNIT parameters, then the rest.

    Gradients are summed over processes. A model that is sharded already is left as it is.
    """
    if isinstance(model, FSDPModule):
        return
    # a view may be returned; writing into it in place is forbidden to losses anyway
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (parallel.world(),))
    scalars = {p for p in model.parameters() if p.dim() == 0}  # cannot be cut: they stay replicated
    for unit in [*_units(model), model]:
        made: Any = fully_shard(unit, mesh=mesh, ignored_params=scalars)
        made.set_gradient_divide_factor(1.0)
        made.set_force_sum_reduction_for_comms(True)
        made.set_reduce_scatter_unused_params(True)
    save, load = model.register_state_dict_post_hook, model.register_load_state_dict_pre_hook
    made.kd_hooks = [save(_put_together), load(_take_apart)]


def _units(model: nn.Module) -> Iterator[nn.Module]:
    """Inner layers before outer ones; none that shares a parameter with what is outside it."""
    used: dict[int, list[str]] = defaultdict(list)
    for name, param in model.named_parameters(remove_duplicate=False):
        used[id(param)].append(name)
    taken: set[int] = set()
    for path, parent in reversed(list(model.named_modules())):
        if not isinstance(parent, nn.ModuleList | nn.Sequential | nn.ModuleDict):
            continue
        for key, layer in parent.named_children():
            inside = f"{path}.{key}.".lstrip(".")
            own = [p for p in layer.parameters() if id(p) not in taken]
            tied = any(not n.startswith(inside) for p in own for n in used[id(p)])
            container = isinstance(layer, nn.ModuleList | nn.ModuleDict)
            if not container and not tied and sum(p.numel() for p in own) >= UNIT:
                taken.update(map(id, own))
                yield layer


def _rest(models: Iterable[nn.Module]) -> None:
    """Free what a forward without a backward left gathered."""
    for module in (module for model in models for module in model.modules()):
        if isinstance(module, FSDPModule):
            module.reshard()


def _cover(model: Any, tapped: Mapping[str, Tensor]) -> None:
    """Let a backward that begins at a tapped tensor gather the layers around it, as one at the outputs does."""
    for path, tensor in tapped.items():
        layer, above = model.model, [model, model.model]
        for name in path.split("."):
            if (layer := layer._modules.get(name)) is None:  # ``in``: the module's input
                break
            above.append(layer)
        for module in dict.fromkeys(above):  # in one order on every process
            if isinstance(module, FSDPModule):
                module._get_fsdp_state()._register_pre_backward_hook(tensor)


def _whole(value: Any) -> Any:
    """Every tensor of a tree of dicts whole: one by one, off the device, which need not hold them all."""
    if isinstance(value, Mapping):
        return {key: _whole(each) for key, each in value.items()}
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value


def _put_together(model: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A sharded model's state dict, as that of any model."""
    state.update(_whole({name: value for name, value in state.items() if name.startswith(prefix)}))


def _take_apart(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    _rest([model])
    for name, param in model.named_parameters(prefix.rstrip("."), remove_duplicate=False):
        if name in state:
            state[name] = _piece(state[name], param)


def _piece(value: Any, like: Tensor) -> Any:
    """A whole tensor as this process holds ``like``; no message is sent. Anything of another form is left."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    here = value.to(like.device, copy=True)
    return distribute_tensor(here, like.device_mesh, like.placements, src_data_rank=None)


def restored(model: nn.Module) -> None:
    """A sharded model as the plain module that it was, whole on every process; others are left alone.

    torch has no way back: this undoes what ``fully_shard`` sets, in its private state.
    """
    if not isinstance(model, FSDPModule):
        return
    _rest([model])
    whole: dict[Any, nn.Parameter] = {p: p for p in model.parameters()}
    for param, piece in ((p, p.detach()) for p in whole):
        if isinstance(piece, DTensor):
            whole[param] = nn.Parameter(piece.full_tensor(), param.requires_grad)
    handles: list[Any] = model.__dict__.pop("kd_hooks")
    for module in model.modules():
        module._parameters.update({n: whole[p] for n, p in module._parameters.items() if p is not None})
        module.__dict__.pop("_is_fsdp_managed_module", None)
        if not isinstance(module, FSDPModule):
            continue
        state: Any = module._get_fsdp_state()
        handles += [state._pre_forward_hook_handle, state._post_forward_hook_handle]
        for group in state._fsdp_param_groups:
            handles += group._module_to_pre_save_state_dict_hook_handle.values()
            handles += group._module_to_pre_load_state_dict_hook_handle.values()
        for key in (STATE_KEY, REGISTRY_KEY):
            module.__dict__.pop(key, None)
        _module_state_mapping.pop(module, None)
        module.__class__ = type(module).__mro__[module._orig_cls_mro_index]
    for handle in handles:
        handle.remove()


# ---- the optimiser -------------------------------------------------------------------------------------


def groups(student: nn.Module, params: list[Any]) -> list[Any]:
    """What is sharded apart from the rest: torch's optimisers mix no two kinds of tensor in a group.

    Cut by what would be sharded, not by what is, so that another number of processes can resume.
    """
    mine = {id(p) for p in student.parameters() if p.dim()}
    cut = [[p for p in params if id(p) in mine], [p for p in params if id(p) not in mine]]
    return [{"params": group} for group in cut if group]


def adapt(wrapper: Any) -> Any:
    """mmengine's optimiser wrapper with a clip that knows pieces, and a state that is whole in its files."""
    wrapper.clip_func = clip_norm
    wrapper.optimizer.register_state_dict_post_hook(lambda _, state: _whole(state))
    wrapper.optimizer.register_load_state_dict_pre_hook(_cut_moments)
    return wrapper


def clip_norm(params: Sequence[nn.Parameter], max_norm: float) -> Tensor:
    """torch's ``clip_grad_norm_`` for sharded gradients beside others, in one message. Returns the old norm."""
    grads = [p.grad for p in params if p.grad is not None]
    square = get_total_norm([g.to_local() for g in grads if isinstance(g, DTensor)]).square()
    if parallel.world() > 1:
        dist.all_reduce(square)
    norm = (square + get_total_norm([g for g in grads if not isinstance(g, DTensor)]).square()).sqrt()
    clip_grads_with_norm_(params, max_norm, norm)
    return norm


def _cut_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    cut = {i: {k: _piece(v, params[i]) for k, v in each.items()} for i, each in state["state"].items()}
    return {**state, "state": cut}
