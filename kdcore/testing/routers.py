"""What routers promise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kdcore.testing.findings import Failed, Skipped, check
from kdcore.testing.subjects import Subject
from kdcore.testing.tensors import finite, same


def _weights(s: Subject, args: dict[str, Any], router: Any = None) -> Tensor:
    found = (s.fresh().eval() if router is None else router)(*args.values())
    return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]


@check("router", after=("runs",))
def weights_shape(s: Subject) -> None:
    """Each sample has one weight a teacher. Do: return [B,K], with one column more where labels_column is declared."""
    args, router = s.calls[0].args, s.fresh()
    wanted = (s.calls[0].size, len(args["teachers"]) + router.labels_column)
    weights = _weights(s, args)
    if tuple(weights.shape) != wanted or not weights.is_floating_point():
        raise Failed(f"weights {tuple(weights.shape)} of {weights.dtype}, not {wanted} of a floating type")
    for k in (1.0, 5e3, 0.0):
        loud = {"teachers": {n: o.at(slice(None)) for n, o in args["teachers"].items()}}
        for each in loud["teachers"].values():
            each.logits = None if each.logits is None else each.logits * k
        if not finite(_weights(s, {**args, **loud})):
            raise Failed(f"weights are not finite with teacher logits times {k:g}")


@check("router", after=("runs", "weights_shape"))
def weights_sum(s: Subject) -> None:
    """Weights that do not sum to 1 change the loss's scale unseen. Do: normalise over the teachers (the last axis), or
    declare sums_to_one = False."""
    if not s.fresh().sums_to_one:
        raise Skipped("declares sums_to_one = False")
    sums = _weights(s, s.calls[0].args).sum(-1)
    if not same(sums, torch.ones_like(sums), 1e-3):
        raise Failed(f"a sample's weights sum to {float(sums.min()):.4g} ... {float(sums.max()):.4g}")


@check("router", after=("runs", "weights_shape"))
def router_gradient(s: Subject) -> None:
    """A router with parameters learns through its weights. Do: look for detach, argmax or no_grad, or give it an
    own_optimizer."""
    router = s.fresh().eval()
    params = [p for p in router.parameters() if p.requires_grad]
    if not params or router.own_optimizer is not None:
        raise Skipped("has no parameters, or trains them itself")
    weights = _weights(s, s.calls[0].args, router)
    found = (
        torch.autograd.grad(weights.square().sum(), params, allow_unused=True)
        if weights.requires_grad
        else ()
    )
    if not any(g is not None and bool(g.any()) for g in found):
        raise Failed("no parameter takes gradient from the weights")


@check("router")
def plan(s: Subject) -> None:
    """The plan says which teachers run at all. Do: return a bool tensor [B,K], or None for all."""
    args = s.calls[0].args
    found, again = (s.fresh().eval().plan(args["batch"], args["student"]) for _ in range(2))
    if found is None:
        return
    wanted = (s.calls[0].size, len(args["teachers"]))
    if not isinstance(found, Tensor) or found.dtype != torch.bool or tuple(found.shape) != wanted:
        raise Failed(
            f"plan is {getattr(found, 'dtype', type(found).__name__)} {tuple(getattr(found, 'shape', ()))}"
        )
    if not torch.equal(found, again):
        raise Failed("two plans for the same batch differ")
