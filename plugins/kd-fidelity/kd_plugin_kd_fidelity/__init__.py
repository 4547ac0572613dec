"""KD-fidelity: whether a distilled student got better and, apart from that, more like its teacher (2505.15442)."""

from __future__ import annotations

from collections.abc import Iterator

from kdcore import Component, hookimpl, lazy

__version__ = "0.1.0"
__getattr__ = lazy(
    __name__,
    agreement="measures",
    answer_agreement="measures",
    bleu="measures",
    calibration_error="measures",
    fidelity="measures",
    Pair="pairs",
    pairs_of="pairs",
    analyse="hypotheses",
    sequence_divergence="loss",
)


@hookimpl
def kd_losses() -> Iterator[Component]:
    yield Component(
        "kd-fidelity",
        "kd_plugin_kd_fidelity.loss:SequenceDivergence",
        summary="the losses under study: forward or reverse KL or JS, mean of each sequence; noise on the teacher",
    )


@hookimpl
def kd_probes() -> Iterator[Component]:
    yield Component(
        "kd-fidelity",
        "kd_plugin_kd_fidelity.probe:KDFidelity",
        summary="improvement over the student alone, agreement and fidelity with each teacher, calibration",
    )
