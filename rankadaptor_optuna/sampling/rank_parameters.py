"""Which parameters of a study are ranks along the depth: the declared ones, else those with names of ranks."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from rankadaptor_optuna.ranks import Module
from rankadaptor_optuna.surrogate.grid import Array

MAX_CANDIDATES = 64  # ranks per layer, which bounds the knapsack's table; set by hand
MIN_LAYERS = 3  # parameters that make a series of ranks; two alike are often no layers; set by hand
_NUMBER = re.compile(r"\d+")
_WORDS = re.compile(r"rank|(?<![a-z])r(?![a-z])", re.IGNORECASE)  # "layer_3_rank", "loraRank3", "lora_r_3", "r3"
_OTHER_WORDS = re.compile(r"alpha|dropout|bits|scal", re.IGNORECASE)  # "lora_r_alpha_3"

_FILLERS = frozenset({"layer", "layers", "l", "model", "lora", "rank", "ranks", "r", ""})
_PARTS = {"attn": "self_attn", "attention": "self_attn", "self_attn": "self_attn", "mlp": "mlp", "ffn": "mlp"} | {
    name: f"{kind}_proj" for kind in ("q", "k", "v", "o", "gate", "up", "down") for name in (kind, f"{kind}_proj")
}

Templates = tuple[str, ...]


def checked_templates(ranks: str | Sequence[str] | None) -> Templates | None:
    """Checks templates of rank parameters' names and returns them as a tuple; None where none were declared.

    Raises:
        ValueError: A template is not a text with exactly one ``{}``.
    """
    if ranks is None:
        return None
    templates = (ranks,) if isinstance(ranks, str) else tuple(ranks)
    for template in templates:
        if not isinstance(template, str) or template.count("{}") != 1:
            raise ValueError(
                'ranks must be templates of names with one {} for the layer number, like "layer_{}_rank", '
                f"got {template!r}."
            )
    return templates


def candidate_ranks(distribution: BaseDistribution) -> Array | None:
    """Returns the non-negative integers that a distribution allows, increasing; None for any other distribution.

    A wide range is thinned to at most 64 values, evenly spaced on its own scale, its ends included.
    """
    if isinstance(distribution, IntDistribution) and distribution.low >= 0:
        n = (distribution.high - distribution.low) // distribution.step + 1
        steps = np.arange(min(n, MAX_CANDIDATES), dtype=np.float64)
        if n > MAX_CANDIDATES:
            spaced = np.geomspace if distribution.log else np.linspace
            steps = np.unique(spaced(1, n, MAX_CANDIDATES).round()) - 1
        return distribution.low + steps * distribution.step
    if isinstance(distribution, CategoricalDistribution):
        choices = distribution.choices
        if all(isinstance(c, int) and not isinstance(c, bool) and c >= 0 for c in choices):
            return np.asarray(sorted(choices), dtype=np.float64)  # type: ignore[type-var]
    return None


def rank_parameters(
    distributions: Mapping[str, BaseDistribution], declared: Templates | None = None
) -> dict[str, tuple[int, str]]:
    """Returns layer number and series of each rank parameter, ``{name: (layer, template)}``, in depth order.

    Ranks have ordered non-negative integers as values, and a layer number in their names; names of one series differ by
    that number only.

    Args:
        distributions: A search space.
        declared: Templates of the names. Default: names that say so (``layer_3_rank``, ``lora_r_3``,
            ``model.layers.3.mlp.r``), at least three of a series.
    """
    readings: dict[str, list[tuple[str, int]]] = {}
    for name, distribution in distributions.items():
        found = [(template, layer) for template, layer in _readings(name) if _is_rank(template, declared)]
        if found and candidate_ranks(distribution) is not None:
            readings[name] = found
    sizes = Counter(template for found in readings.values() for template, _ in found)
    layers = {}
    for name, found in readings.items():
        template, layer = max(found, key=lambda reading: sizes[reading[0]])
        if declared is not None or sizes[template] >= MIN_LAYERS:
            layers[name] = layer, template
    return dict(sorted(layers.items(), key=lambda item: (item[1][0], item[0])))


def _readings(name: str) -> list[tuple[str, int]]:
    """Returns template and number for each number in a name, any of which may be the layer's."""
    return [(f"{name[: m.start()]}{{}}{name[m.end() :]}", int(m[0])) for m in _NUMBER.finditer(name)]


def modules_of_ranks(ranks: Mapping[str, tuple[int, str]]) -> dict[str, Module]:
    """Returns the module of each rank parameter, given its layer number and series.

    With one series it is the layer, else the part of the layer that the series names: ``"3.q_proj"``, ``"3.mlp"``. It
    is the parameter's name where a series names no part.
    """
    parts = {template: _part_of(template) for _, template in ranks.values()}
    if len(set(ranks.values())) < len(ranks):  # "layer_1_rank" and "layer_01_rank"
        return {name: name for name in ranks}
    if len(parts) == 1:
        return {name: layer for name, (layer, _) in ranks.items()}
    if None in parts.values() or len(set(parts.values())) < len(parts):
        return {name: name for name in ranks}
    return {name: f"{layer}.{parts[template]}" for name, (layer, template) in ranks.items()}


def _part_of(template: str) -> str | None:
    words = [word for word in re.split(r"[^a-z]+", template.lower()) if word not in _FILLERS]
    return next((_PARTS[key] for i in range(len(words)) if (key := "_".join(words[i:])) in _PARTS), None)


def rank_template(name: str, distribution: BaseDistribution) -> str | None:
    """Returns the template of a single name that says that its parameter is a layer's rank; None for other names."""
    found = [template for template, _ in _readings(name) if _is_rank(template, None)]
    return found[0] if found and candidate_ranks(distribution) is not None else None


def why_no_ranks(distributions: Mapping[str, BaseDistribution], declared: Templates | None) -> str | None:
    """Returns the reason why none of some parameters is a rank; None where they neither look like ranks nor should."""
    likely = sorted(name for name in distributions if any(_is_rank(each, declared) for each, _ in _readings(name)))
    if not likely:
        return None if not declared else f"no name matches the declared ranks, {', '.join(map(repr, declared))}"
    for name in likely:
        if candidate_ranks(distributions[name]) is None:
            return f"ranks take integers from 0 on, {name!r} has {distributions[name]!s:.80}"
    return f"fewer than {MIN_LAYERS} names differ from {likely[0]!r} by a layer number only; ranks=... declares fewer"


def _is_rank(template: str, declared: Templates | None) -> bool:
    if declared is not None:
        return template in declared
    return bool(_WORDS.search(template)) and not _OTHER_WORDS.search(template)


def middle_candidate(distribution: BaseDistribution, candidates: Array) -> float:
    """Returns the candidate in the middle of a distribution's range, on a logarithmic scale where it has one.

    It is positive, where a candidate is: no adapters would be no reference for gains.
    """
    if isinstance(distribution, IntDistribution) and distribution.log:
        return float(candidates[np.abs(np.log(candidates / np.sqrt(candidates[0] * candidates[-1]))).argmin()])
    middle = float(candidates[(len(candidates) - 1) // 2])
    return middle or float(candidates[min(1, len(candidates) - 1)])
