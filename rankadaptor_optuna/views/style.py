"""Palette and number formats of every view."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rankadaptor_optuna.surrogate.statistics import alike, t_interval

# Okabe and Ito's palette, which readers with colour blindness can tell apart: https://jfly.uni-koeln.de/color/
BLUE, VERMILION, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"
GREY, BLACK = "#999999", "#000000"
RECOMMENDED, UNIFORM, NOT_SEARCHED, PRUNED, SENSITIVITY = BLUE, VERMILION, GREY, ORANGE, PURPLE
SUBLAYERS = (BLUE, GREEN)  # attention, MLP


def as_count(n: float) -> str:
    """Returns a number of things: ``1,234,567``."""
    return f"{n:,.0f}"


def as_millions(n: float) -> str:
    """Returns a large number of parameters: ``134.5M``."""
    return f"{n / 1e6:.1f}M"


def as_percent(share: float, digits: int = 1) -> str:
    """Returns a share of 1 in percent: ``12.3%``."""
    return f"{share:.{digits}%}"


def as_score(value: float) -> str:
    """Returns a score of unknown scale, with five significant digits."""
    return f"{value:.5g}"


def as_mean(values: Sequence[float], digits: int = 2) -> str:
    """Returns the mean with the half width of its 95% t interval, ``2.72 ± 0.05``; alone where values do not differ."""
    mean = f"{np.mean(values):.{digits}f}"
    if alike(values):
        return mean
    low, high = t_interval(values)
    return f"{mean} ± {(high - low) / 2:.{digits}f}"


def as_json(settings: Mapping[str, Any]) -> str:
    """Returns nested settings as JSON, one section a line, without unset ones."""
    sections = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            value = {key: setting for key, setting in value.items() if setting is not None}
        if value is not None:
            sections.append(f" {json.dumps(name)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(sections) + "\n}"
