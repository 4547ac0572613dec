"""DDK: the domains in which the student lags its teacher most are sampled most, smoothly (arXiv 2407.16154)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__, ddk_loss="loss", discrepancy="mixture", smoothed="mixture", DomainSampler="sampler"
)


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "ddk", "kd_plugin_ddk.loss:ddk_loss", "divergence of token logits beside the labels' term"
    )


@hookimpl
def kd_augmentations() -> Iterator[Component]:
    yield Component(
        "ddk",
        "kd_plugin_ddk.sampler:DomainSampler",
        "samples domains by the student's lag, renewed every K steps",
    )
