"""Options of pruning, declared once for Python, recipes and the command line; does not import torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from rankadaptor_optuna.checks.numbers import check_numbers

Criterion = Literal["param_first", "param_second", "param_mix", "l1", "l2", "random"]
BlockCriterion = Literal["ppl", "taylor", "magnitude", "random"]
Reduction = Literal["sum", "mean", "max", "prod", "first"]
Ranking = Literal["global", "local"]
Structure = Literal["units", "hidden"]

# LLM-Pruner, scripts/llama_prune.sh: --pruning_ratio 0.25, layers 4 to 29 of LLaMA-7B's 32, --taylor param_first;
# hf_prune.py: 10 samples of 64 tokens, ranked layer by layer. Shortened LLaMA keeps the same 4 and 2 layers.
_LLAMA_7B_LAYERS, _KEPT_FIRST, _KEPT_LAST = 32, 4, 2
_LLM_PRUNER = {"criterion": "param_first", "ranking": "local", "n_samples": 10, "sample_length": 64}
_LLM_PRUNER_LAYER_RATIO = 0.25


@dataclass(frozen=True)
class PruningMethod:
    """Options and defaults of a pruning method.

    Attributes:
        criteria: Importance criteria, the default first.
        n_samples: Default number of calibration samples.
        sample_length: Default number of tokens per sample.
        keeps_ends: Whether the layers of `default_kept` stay whole by default.
        defaults: Options that other methods lack, with their defaults.
    """

    criteria: tuple[str, ...]
    n_samples: int
    sample_length: int
    keeps_ends: bool = True
    defaults: Mapping[str, Any] = field(default_factory=dict)


PRUNING_METHODS: dict[str, PruningMethod] = {
    # LLM-Pruner's defaults (hf_prune.py) but for the global ranking and the sample length, which are set by hand
    "llm-pruner": PruningMethod(
        criteria=get_args(Criterion),
        n_samples=10,
        sample_length=128,
        defaults={"reduction": "sum", "ranking": "global", "structure": "units", "steps": 1},
    ),
    # Shortened LLaMA, section 4.1: 10 samples of 128 tokens
    "shortened": PruningMethod(criteria=get_args(BlockCriterion), n_samples=10, sample_length=128),
    # set by hand for CPUs; SlimGPT takes 256 samples of 2048 tokens
    "slimgpt": PruningMethod(criteria=("obs",), n_samples=128, sample_length=256, keeps_ends=False),
}
_CHOICES = {"reduction": get_args(Reduction), "ranking": get_args(Ranking), "structure": get_args(Structure)}
_LEAST = {"steps": 1, "keep_first": 0, "keep_last": 0, "multiple_of": 1, "n_samples": 1, "sample_length": 2}


@dataclass(frozen=True)
class PruningConfig:
    """Options of `prune`. None stands for the method's default.

    Attributes:
        method: Pruning method: llm-pruner, shortened or slimgpt.
        ratio: Share of the parameters of all transformer blocks to remove, in (0, 1); embeddings do not count.
        criterion: Importance criterion. Default: param_first for llm-pruner, ppl for shortened, obs for slimgpt.
        reduction: How llm-pruner combines the importance of a unit's projections. Default: sum.
        ranking: Whether llm-pruner ranks units globally or within each layer. Default: global.
        structure: Whether llm-pruner removes units (heads and MLP channels) or hidden channels. Default: units.
        steps: Number of steps in which llm-pruner reaches the ratio, scoring anew before each. Default: 1.
        keep_first: Number of first layers that stay whole. Default: 4 of 32, in proportion; 0 for slimgpt.
        keep_last: Number of last layers that stay whole. Default: 2 of 32, in proportion; 0 for slimgpt.
        multiple_of: Round MLP widths to this multiple. Default: 32.
        n_samples: Number of calibration samples. Default: 10; 128 for slimgpt.
        sample_length: Tokens per calibration sample. Default: 128; 256 for slimgpt.
        seed: Seed of the calibration samples and of random importance. Default: 0.

    Raises:
        ValueError: An option is out of range, unknown, or unused by the method.
    """

    method: str = "llm-pruner"
    ratio: float = 0.25
    criterion: str | None = None
    reduction: Reduction | None = None
    ranking: Ranking | None = None
    structure: Structure | None = None
    steps: int | None = None
    keep_first: int | None = None
    keep_last: int | None = None
    multiple_of: int | None = None
    n_samples: int | None = None
    sample_length: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.method not in PRUNING_METHODS:
            raise ValueError(f"method {self.method!r} is unknown; known methods: {', '.join(PRUNING_METHODS)}")
        check_numbers(self)
        if not 0 < self.ratio < 1:
            raise ValueError(
                f"ratio must lie between 0 and 1, got {self.ratio}: it is the share of block parameters to remove"
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        for name, known in {"criterion": PRUNING_METHODS[self.method].criteria, **_CHOICES}.items():
            value = getattr(self, name)
            if value is not None and value not in known:
                owner = f" to {self.method}" if name == "criterion" else ""
                raise ValueError(f"{name} {value!r} is unknown{owner}; known: {', '.join(known)}")
        self._check_used()

    def _check_used(self) -> None:
        """Checks that every option set to another value than its default has an effect."""
        used, user = set(PRUNING_METHODS[self.method].defaults), f"method {self.method!r}"
        if "structure" in used and self.structure == "hidden":
            used, user = {"structure"}, "structure 'hidden'"
        for method in PRUNING_METHODS.values():
            for name, default in method.defaults.items():
                value = getattr(self, name)
                if name not in used and value not in (None, default):
                    raise ValueError(f"{name}={value!r} has no effect with {user}; leave it out")

    def changed(self, **changes: Any) -> PruningConfig:  # noqa: ANN401
        """Returns a copy with some options changed.

        Raises:
            ValueError: An option is unknown, out of range, or unused by the method.
        """
        known = [option.name for option in fields(self)]
        if unknown := changes.keys() - set(known):
            raise ValueError(f"unknown pruning option {min(unknown)!r}; known options: {', '.join(known)}")
        return replace(self, **changes)

    def resolved(self, n_layers: int) -> dict[str, Any]:
        """Fills in the defaults.

        Args:
            n_layers: Depth of the dense model.

        Returns:
            The value of every option that the method uses, by name, but for `method` itself.

        Raises:
            ValueError: Every layer would stay whole.
        """
        method = PRUNING_METHODS[self.method]
        ends = default_kept(n_layers) if method.keeps_ends and self.structure != "hidden" else (0, 0)
        defaults = {
            "ratio": self.ratio,
            "criterion": method.criteria[0],
            "keep_first": ends[0],
            "keep_last": ends[1],
            "multiple_of": 32,  # set by hand: a size of tensor-core tiles
            "n_samples": method.n_samples,
            "sample_length": method.sample_length,
            "seed": 0,
            **method.defaults,
        }
        given = {name: getattr(self, name) for name in defaults}
        settings = {name: default if given[name] is None else given[name] for name, default in defaults.items()}
        first, last = settings["keep_first"], settings["keep_last"]
        if first + last >= n_layers:
            raise ValueError(
                f"nothing to prune: of the model's {n_layers} layers the first {first} and the last {last} "
                "are kept; lower keep_first or keep_last, or take a deeper model"
            )
        return settings


def default_kept(n_layers: int) -> tuple[int, int]:
    """Returns how many layers stay whole at the start and at the end by default: 4 and 2 of 32, in proportion."""
    first, last = (max(1, round(n_layers * kept / _LLAMA_7B_LAYERS)) for kept in (_KEPT_FIRST, _KEPT_LAST))
    return first, last


def llm_pruner_preset(n_layers: int) -> dict[str, Any]:
    """Returns the arguments of `prune` for the setting that LLM-Pruner publishes for LLaMA-7B.

    Each layer but the first 4 and last 2 of 32 (other depths in proportion) loses a quarter of its heads and channels,
    ranked within the layer by `"param_first"` on 10 samples of 64 tokens.

    Args:
        n_layers: Depth of the dense model.
    """
    first, last = default_kept(n_layers)
    ratio = _LLM_PRUNER_LAYER_RATIO * (n_layers - first - last) / n_layers
    return {"method": "llm-pruner", "ratio": ratio, "keep_first": first, "keep_last": last, **_LLM_PRUNER}


def option_help() -> dict[str, str]:
    """Returns a one-line description of each option, by name, from the docstring of `PruningConfig`."""
    described = dict(re.findall(r"^ +(\w+): (.+)$", PruningConfig.__doc__ or "", flags=re.MULTILINE))
    return {option.name: described.get(option.name, "") for option in fields(PruningConfig)}
