"""Models sharded over processes (FSDP): parameters, gradients and optimiser state in pieces, one a process.

torch's ``fully_shard`` does it, at the place where mmengine's Runner would wrap the model. mmengine's own
FSDPStrategy is built on torch's older FullyShardedDataParallel, which refuses a machine without an accelerator,
averages gradients (here every term is divided by its global count, so they are summed), and holds one forward a
step. A sharded model is what it was to everybody else: the same object, called the same way; only its parameters
are DTensors between steps. ``restored`` makes it a plain module again.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdcore import parallel
from kdcore.errors import InputError
from kdcore.kinds import Router
from kdcore.parts import Parts
from kdcore.tables import TrainTable

UNIT = 2**16  # parameters: a smaller element of a list of layers is gathered with its parent


def chosen(parts: Parts, train: TrainTable, teachers: Iterable[str]) -> tuple[str, ...]:
    """The models to shard: the student under ``fsdp``, with teachers made of it, and ``teachers``.

    Raises InputError where something in the recipe needs a model's parameters whole.
    """
    if train.strategy != "fsdp":
        _check_teachers(parts, teachers)
        return tuple(teachers)
    hint = 'take train.strategy out: "replicate" does all of this'
    for name, component in parts.components():
        if component.own_optimizer is not None:
            problem = f"fsdp trains with one optimiser, and {name} steps its own through run.update"
            raise InputError("train.strategy", problem, given="fsdp", hint=hint)
        if hasattr(component, "merge"):
            problem = f"fsdp holds gradients in pieces, and {name} merges them whole"
            raise InputError("train.strategy", problem, given="fsdp", hint=hint)
    if train.precision == "fp16":
        problem = "fsdp has no loss scaling here"
        raise InputError("train.precision", problem, given="fp16", allowed="fp32, bf16")
    made = [name for name, teacher in parts.teachers.items() if teacher.saved]
    _check_teachers(parts, teachers)
    return ("student", *dict.fromkeys([*made, *teachers]))


def _check_teachers(parts: Parts, names: Iterable[str]) -> None:
    planned = parts.router is not None and type(parts.router).plan is not Router.plan
    for name in names:
        if planned and name in parts.routed:
            problem = "the router plans which teachers run, so processes would wait for each other's pieces"
            hint = "leave this teacher replicated"
            raise InputError(f"teacher.{name}.shard", problem, given=True, hint=hint)


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard in place, layer by layer: each element of a list of layers with UNIT parameters, then the rest.

    Gradients are summed over processes. A model that is sharded already is left as it is.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if is_sharded(model):
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


def is_sharded(model: nn.Module) -> bool:
    if parallel.world() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def cover(model: nn.Module, root: nn.Module, seen: Mapping[str, Tensor]) -> None:
    """Let a backward that begins at a tapped tensor gather the layers around it, as one at the outputs does."""
    for path, tensor in seen.items() if torch.is_grad_enabled() else ():
        names = path.split(".")
        around = [model] + [_at(root, names[:k]) for k in range(len(names) + 1)]
        for module in {id(m): m for m in around if m is not None and is_sharded(m)}.values():
            module._get_fsdp_state()._register_pre_backward_hook(tensor)  # type: ignore[operator]


def _at(root: nn.Module, names: list[str]) -> nn.Module | None:
    """The module at a path; None for the ``in`` of a module's input."""
    found: nn.Module | None = root
    for name in names:
        found = found._modules.get(name) if found is not None else None
    return found


@contextmanager
def asked_only(model: Any) -> Iterator[None]:
    """For gradients at the outputs before the backward: what was gathered stays so, and nothing is summed."""
    sharded = is_sharded(model)
    if sharded:
        model.set_requires_gradient_sync(False)
        model.set_reshard_after_backward(False)
    try:
        yield
    finally:
        if sharded:
            model.set_requires_gradient_sync(True)
            model.set_reshard_after_backward(True)


def rest(models: Iterable[nn.Module]) -> None:
    """Free what a forward without a backward left gathered."""
    for model in models:
        for module in model.modules() if is_sharded(model) else ():
            if is_sharded(module):
                module.reshard()  # type: ignore[operator]


def restored(model: nn.Module) -> None:
    """A sharded model as the plain module that it was, whole on every process; others are left alone."""
    from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
    from torch.distributed._composable_state import _module_state_mapping

    if not is_sharded(model):
        return
    rest([model])
    whole: dict[nn.Parameter, nn.Parameter] = {}
    for param in model.parameters():
        full = parallel.whole(param.detach())
        whole[param] = nn.Parameter(full, param.requires_grad) if full is not param else param
    for module in model.modules():
        module._parameters.update({n: whole[p] for n, p in module._parameters.items() if p is not None})
        module.__dict__.pop("_is_fsdp_managed_module", None)
        if not is_sharded(module):
            continue
        state: Any = module._get_fsdp_state()  # type: ignore[operator]
        handles = [state._pre_forward_hook_handle, state._post_forward_hook_handle]
        for group in state._fsdp_param_groups:
            handles += group._module_to_pre_save_state_dict_hook_handle.values()
            handles += group._module_to_pre_load_state_dict_hook_handle.values()
        for handle in handles:
            handle.remove()
        for key in (STATE_KEY, REGISTRY_KEY):
            module.__dict__.pop(key, None)
        _module_state_mapping.pop(module, None)
        module.__class__ = type(module).__mro__[module._orig_cls_mro_index]  # type: ignore[index]
