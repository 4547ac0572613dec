"""What routers promise."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from kdcore.testing.findings import DECLARED, check, fail_if, skip_if
from kdcore.testing.subjects import Call, Subject
from kdcore.testing.tensors import finite, gradients, same

SHAPED = (*DECLARED, "runs", "weights_shape")


def _weights(s: Subject, call: Call, router: Any = None) -> Tensor:
    found = (router or s.fresh()).eval()(*call.args.values())
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


@check("router", after=(*DECLARED, "runs"))
def weights_shape(s: Subject, call: Call) -> None:
    """Each sample has one weight a teacher. Do: return [B,K], with one column more where labels_column is declared."""
    wanted = (call.size, len(call.args["teachers"]) + s.fresh().labels_column)
    weights = _weights(s, call)
    wrong = tuple(weights.shape) != wanted or not weights.is_floating_point()
    fail_if(wrong, f"weights {tuple(weights.shape)} of {weights.dtype}, not {wanted} of a floating type")
    for k in (1.0, 5e3, 0.0):
        changed = call.but(partial(_louder, k))
        fail_if(not finite(_weights(s, changed)), f"weights are not finite with teacher logits times {k:g}")


def _louder(k: float, path: str, tensor: Tensor) -> Tensor:
    return tensor * k if path.startswith("teachers/") and path.endswith("/logits") else tensor


@check("router", after=SHAPED)
def weights_sum(s: Subject, call: Call) -> None:
    """Weights that do not sum to 1 change the loss's scale unseen. Do: normalise over the teachers (the last axis), or
    declare sums_to_one = False."""
    skip_if(not s.fresh().sums_to_one, "declares sums_to_one = False")
    sums = _weights(s, call).sum(-1)
    wrong = not same(sums, torch.ones_like(sums), 1e-3)
    fail_if(wrong, f"a sample's weights sum to {float(sums.min()):.4g} ... {float(sums.max()):.4g}")


@check("router", after=SHAPED)
def router_gradient(s: Subject, call: Call) -> None:
    """A router with parameters learns through its weights. Do: look for detach, argmax or no_grad, or give it an
    own_optimizer."""
    router = s.fresh()
    params = {name: p for name, p in router.named_parameters() if p.requires_grad}
    skip_if(not params or router.own_optimizer is not None, "has no parameters, or trains them itself")
    found = gradients(_weights(s, call, router).square().sum(), params).values()
    learns = any(grad is not None and bool(grad.any()) for grad in found)
    fail_if(not learns, "no parameter takes gradient from the weights")


@check("router")
def plan(s: Subject, call: Call) -> None:
    """The plan says which teachers run at all. Do: return a bool tensor [B,K], or None for all."""
    found, again = (s.fresh().eval().plan(call.args["batch"], call.args["student"]) for _ in range(2))
    if found is None:
        return
    wanted = (torch.bool, (call.size, len(call.args["teachers"])))
    fail_if(not isinstance(found, Tensor), f"plan is a {type(found).__name__}")
    got = found.dtype, tuple(found.shape)
    fail_if(got != wanted, f"plan is {got[0]} {got[1]}, not {wanted[0]} {wanted[1]}")
    fail_if(not torch.equal(found, again), "two plans for the same batch differ")
