"""Divergences of token or class distributions as losses: the baselines of language-model distillation."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"

_SUMMARIES = {
    "forward_kl": "KL(p || q): covers the teacher's modes",
    "reverse_kl": "KL(q || p): seeks the teacher's main modes",
    "jeffreys": "forward plus reverse KL",
    "js": "Jensen-Shannon divergence",
    "generalized_js": "JS with a weight beta on the teacher (GKD)",
    "skew_forward_kl": "KL(p || alpha p + (1 - alpha) q) (DistiLLM)",
    "skew_reverse_kl": "KL(q || (1 - alpha) p + alpha q) (DistiLLM)",
    "total_variation": "half the L1 distance of the probabilities",
    "adaptive_kl": "forward and reverse KL weighed by the gaps of head and tail (AKL)",
    "hellinger": "squared Hellinger distance",
    "alpha_divergence": "the alpha family between reverse and forward KL",
}
__getattr__ = lazy(__name__, **dict.fromkeys(_SUMMARIES, "losses"))


@hookimpl
def kd_losses() -> Iterator[Component]:
    for function, summary in _SUMMARIES.items():
        yield Component(
            f"divergences.{function}", f"kd_plugin_divergences.losses:{function}", summary=summary
        )
