"""What the losses must give: BitDistiller's code run once in float64, two classes by hand, and numpy for the rest."""

from __future__ import annotations

import math

import numpy as np
from scipy.special import log_softmax

from kdcore.testing import Oracle

_TOPKLD, _CAKLD = "kd_plugin_topkld.loss:topkld_loss", "kd_plugin_topkld.loss:cakld_loss"
_AUTHORS = "DD-DuDa/BitDistiller@9faaab8 train/mytrainer.py, cakld_loss, one position at a time"


def wave(phase: float, *shape: int) -> list:  # type: ignore[type-arg]
    """2 sin(1.7 i + phase), nested: the logits that BitDistiller's code was run on."""
    return (2 * np.sin(1.7 * np.arange(math.prod(shape)) + phase)).reshape(shape).tolist()  # type: ignore[no-any-return]


_LOGITS = {"student_logits": wave(0.0, 2, 3, 4), "teacher_logits": wave(1.0, 2, 3, 4)}
_FORWARD = [
    [0.8938501193454906, 0.6898791245063207, 0.4839386603700787],
    [0.5594508543646431, 0.478111817180891, 0.7352769147364477],
]
_REVERSE = [
    [0.7381154965754072, 0.9067890284812086, 0.5201883652955459],
    [0.5301944728354939, 0.5229068371067844, 0.5413719307215321],
]
_FORWARD_GRADIENT = [
    [
        [-0.08611289693281308, 0.08853217464337032, 0.008181600164249401, -0.010600877874806689],
        [-0.06442453316431627, 0.08690772493140468, 0.002752628995589757, -0.025235820762678173],
        [0.016674934844292406, 0.037533044106828915, -0.0005551224469247216, -0.05365285650419661],
    ],
    [
        [0.07161110915086855, 0.010345870470546664, -0.005712641427178177, -0.07624433819423708],
        [0.06712022164776599, 0.0022821900786726764, -0.021939077050848077, -0.0474633346755906],
        [0.035815034970765, -0.0013205246582102292, -0.06616719138707733, 0.03167268107452257],
    ],
]
_REVERSE_GRADIENT = [
    [
        [-0.04565659090674997, 0.04557471005855449, 0.006681871583829702, -0.006599990735634166],
        [-0.0923571170193362, 0.10816117957502804, -0.0005845631017344419, -0.015219499453957357],
        [-0.03759440175437537, 0.06923878743157959, -0.001967712781237731, -0.029676672895966445],
    ],
    [
        [0.0469891769387275, 0.014007111808982411, -0.004088092466628655, -0.05690819628108123],
        [0.08150805599410889, 0.0006838185269828138, -0.008799823774011518, -0.07339205074708025],
        [0.048450586492827345, -0.0024182324168796616, -0.023214566554377463, -0.022817787521570224],
    ],
]
_MIXED = [
    [0.8471297325144655, 0.754952095698787, 0.4948135718477188],
    [0.5506739399058984, 0.491550323158659, 0.677105419531973],
]
_MIXED_GRADIENT = [
    [
        [-0.07397600512499414, 0.07564493526792555, 0.007731681590123492, -0.00940061173305493],
        [-0.07280430832082226, 0.09328376132449163, 0.001751471366392496, -0.022230924370061928],
        [0.0003941338646920751, 0.047044767104254114, -0.0009788995472186242, -0.04646000142172756],
    ],
    [
        [0.06422452948722622, 0.01144424287207739, -0.005225276739013319, -0.07044349562029031],
        [0.07143657195166886, 0.0018026786131657183, -0.01799730106779711, -0.05524194949703748],
        [0.0396057004273837, -0.0016498369858110589, -0.05328140393726736, 0.015325540495694713],
    ],
]

_ZS, _ZT = np.array(wave(0.4, 4, 6)), np.array(wave(2.1, 4, 6))


def _by_element(k: int, variant: str) -> tuple[list[float], list[list[float]]]:
    """The corrected loss of each row, and its mean's gradient.

    By log q_i, R_i = q (lq - lp) - q + p has the derivative q (lq - lp), F_i = p (lp - lq) - p + q has q - p; a
    derivative u by log q is u - q sum(u) by logits.
    """
    lp, lq = log_softmax(_ZT, 1), log_softmax(_ZS, 1)
    p, q = np.exp(lp), np.exp(lq)
    top = np.argsort(np.argsort(-p, 1), 1) < k
    reverse = top if variant == "A" else ~top
    value = np.where(reverse, q * (lq - lp) - q + p, p * (lp - lq) - p + q).sum(1)
    u = np.where(reverse, q * (lq - lp), q - p)
    return value.tolist(), ((u - q * u.sum(1, keepdims=True)) / len(u)).tolist()


def _two(name: str, value: float, **params: object) -> Oracle:
    logits = {
        "student_logits": [np.log([0.6, 0.4]).tolist()],
        "teacher_logits": [np.log([0.7, 0.3]).tolist()],
    }
    source = "closed form: p = (0.7, 0.3), q = (0.6, 0.4), worked by hand"
    return Oracle(name, _TOPKLD, logits, [value], source, params=params, tolerance=(1e-7, 1e-4, 5e-2))


def _six(k: int, variant: str) -> Oracle:
    value, gradient = _by_element(k, variant)
    logits = {"student_logits": _ZS.tolist(), "teacher_logits": _ZT.tolist()}
    source = "closed form: element by element in numpy, gradient u - q sum(u)"
    params = {"k": k, "variant": variant}
    return Oracle(
        f"six tokens, k = {k}, {variant}",
        _TOPKLD,
        logits,
        value,
        source,
        {"student_logits": gradient},
        params,
    )


ORACLES = [
    Oracle(
        "CAKLD, gamma = 0.3",
        _CAKLD,
        _LOGITS,
        _MIXED,
        _AUTHORS,
        {"student_logits": _MIXED_GRADIENT},
        {"gamma": 0.3},
    ),
    Oracle(
        "k = 0 is forward KL",
        _TOPKLD,
        _LOGITS,
        _FORWARD,
        _AUTHORS,
        {"student_logits": _FORWARD_GRADIENT},
        {"k": 0},
    ),
    Oracle(
        "k = V is reverse KL",
        _TOPKLD,
        _LOGITS,
        _REVERSE,
        _AUTHORS,
        {"student_logits": _REVERSE_GRADIENT},
        {"k": 4},
    ),
    Oracle(
        "in B the other way round, raw alike",
        _TOPKLD,
        _LOGITS,
        _REVERSE,
        _AUTHORS,
        {"student_logits": _REVERSE_GRADIENT},
        {"k": 0, "variant": "B", "corrected": False},
    ),
    _two("two tokens, A", 0.02120497037, k=1),
    _two("two tokens, B", 0.02297830486, k=1, variant="B"),
    _two("two tokens, raw A", -0.17879502963, k=1, corrected=False),
    _two("two tokens, raw B", 0.22297830486, k=1, variant="B", corrected=False),
    *(_six(k, variant) for k in (1, 3) for variant in "AB"),
]
