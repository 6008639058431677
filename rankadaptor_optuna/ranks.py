"""Ranks: a rank configuration as parameters of PEFT, given the adapters' other settings."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Module = int | str  # a layer's index, or a part of a layer such as "3.mlp"

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ALPHA_RATIO = 2.0  # set by hand; LLM-Pruner's alpha 16 at rank 8


@dataclass(frozen=True)
class LoraSettings:
    """The settings of the adapters except their ranks.

    Attributes:
        targets: Names of the adapted modules: last path components, or ``PATH.*.NAME``, ``*`` being the layer's index.
        alpha_ratio: Alpha as a multiple of each module's rank: all modules have the same scaling, alpha / rank.
        alpha: One alpha for all modules instead, as in LLM-Pruner's recovery: low ranks are scaled up.
        dropout: Dropout before the adapters, in [0, 1).

    Raises:
        ValueError: A setting is out of range.
    """

    targets: tuple[str, ...] = TARGETS
    alpha_ratio: float = ALPHA_RATIO
    alpha: float | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if not self.targets:
            raise ValueError("targets must name at least one module, such as q_proj, got none.")
        for name in ("alpha_ratio", "alpha"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive, got {value}.")
            if value == math.inf:
                raise ValueError(f"{name} must be finite, got {value}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1), got {self.dropout}.")

    @classmethod
    def of(cls, settings: Mapping[str, Any]) -> LoraSettings:
        """Reads the settings from JSON (a recipe's ``lora`` section); missing settings take their defaults.

        Raises:
            ValueError: A setting is out of range or of another type.
        """
        try:
            known = {name: settings[name] for name in cls.__dataclass_fields__ if name in settings}
            if "targets" in known:
                known["targets"] = tuple(known["targets"])
            found = cls(**known)
        except TypeError as error:
            raise ValueError(f"no settings of LoRA: {settings!r:.80} ({error}).") from None
        if isinstance(settings.get("targets"), str) or not all(isinstance(name, str) for name in found.targets):
            raise ValueError(f"targets must be a list of names, got {settings['targets']!r:.80}.")
        return found

    def alpha_of(self, rank: int) -> float:
        """Returns alpha of a module with this rank; LoRA scales its product by alpha / rank."""
        return self.alpha or self.alpha_ratio * rank

    def lora_alpha(self, rank: int) -> int:
        """Returns PEFT's ``lora_alpha``, an integer, for a module with this rank; ``alpha_pattern`` is exact."""
        return max(1, round(self.alpha_of(rank)))


class Ranks(dict[Module, int]):
    """A rank configuration: the rank of each module, in depth order.

    A module is a layer, ``{3: 8}``, or a part of a layer, ``{"3.mlp": 8}``; rank 0 means no adapter. A configuration
    compares, prints and serialises as the ``dict`` that it is.

    Args:
        ranks: Rank by module.
    """

    def __init__(self, ranks: Mapping[Any, int] | Iterable[tuple[Any, int]] = ()) -> None:
        super().__init__({module: int(rank) for module, rank in dict(ranks).items()})

    @classmethod
    def uniform(cls, modules: Iterable[Module], rank: int) -> Ranks:
        """Returns the configuration with one rank in all modules."""
        return cls(dict.fromkeys(modules, rank))

    @classmethod
    def from_json(cls, ranks: Mapping[str, int]) -> Ranks:
        """Returns the configuration in an object that ``to_json`` returned."""
        return cls({int(module) if module.isdigit() else module: rank for module, rank in ranks.items()})

    def to_json(self) -> dict[str, int]:
        """Returns the configuration with modules as text, for a JSON object."""
        return {str(module): rank for module, rank in self.items()}

    @property
    def adapted(self) -> Ranks:
        """The part of the configuration with positive ranks: the modules that have an adapter."""
        return Ranks({module: rank for module, rank in self.items() if rank > 0})

    @property
    def rank_pattern(self) -> dict[str, int]:
        """PEFT's ``rank_pattern`` without modules of rank 0, which ``lora_arguments`` excludes.

        For models whose list of layers is named ``layers``; see ``rank_pattern_of``.
        """
        return self.rank_pattern_of(LoraSettings())

    def rank_pattern_of(self, settings: LoraSettings) -> dict[str, int]:
        """Returns ``rank_pattern`` for models whose list of layers is named as in the settings' targets."""
        return {_pattern(module, settings.targets): rank for module, rank in self.adapted.items()}

    def alpha_pattern(self, settings: LoraSettings | None = None) -> dict[str, float]:
        """Returns PEFT's ``alpha_pattern``: alpha in proportion to rank, or one alpha for all, as the settings say.

        Alpha in proportion to rank makes the effective learning rate independent of the ranks.
        """
        settings = settings or LoraSettings()
        return {_pattern(module, settings.targets): settings.alpha_of(rank) for module, rank in self.adapted.items()}

    def lora_arguments(self, settings: LoraSettings | None = None) -> dict[str, Any]:
        """Returns the arguments of ``peft.LoraConfig``, JSON-able; modules of rank 0 are excluded by name.

        Raises:
            ValueError: No module has a positive rank.
        """
        settings, adapted = settings or LoraSettings(), self.adapted
        if not adapted:
            raise ValueError("every layer has rank 0: there is nothing to train.")
        default = max(adapted.values())
        targets = sorted(settings.targets)
        where: dict[str, Any] = {"layers_to_transform": sorted(adapted), "layers_pattern": "layers"}
        if any("*" in target for target in targets):
            targets, where = _full_names(adapted, settings.targets), {}
        elif any(isinstance(module, str) for module in adapted):
            where = {"exclude_modules": _all_but(adapted)}
        return {
            "r": default,
            "lora_alpha": settings.lora_alpha(default),
            "rank_pattern": adapted.rank_pattern_of(settings),
            "alpha_pattern": adapted.alpha_pattern(settings),
            "target_modules": targets,
            **where,
            "lora_dropout": settings.dropout,
            "bias": "none",
            "task_type": "CAUSAL_LM",
        }


def layers_path(targets: Iterable[str]) -> str:
    """Returns the dotted name of the list of layers in names of adapted modules; ``layers`` if they do not tell."""
    return next((target.partition(".*.")[0] for target in targets if ".*." in target), "layers")


def _pattern(module: Module, targets: Iterable[str]) -> str:
    """Returns the regular expression by which PEFT finds the submodules of a module."""
    layers = re.escape(layers_path(targets).rpartition(".")[2])
    layer, _, part = str(module).partition(".")
    if part in TARGETS:
        return rf"{layers}\.{layer}\.(.*\.)?{part}"
    return rf"{layers}\.{re.escape(str(module))}\..*"  # escaped: "layers.1.*" would match layers 10 and 11, too


def _full_names(modules: Iterable[Module], targets: Iterable[str]) -> list[str]:
    """Returns the dotted names of the submodules to adapt in some modules; ``targets`` are of the form PATH.*.NAME."""
    names = []
    for module in modules:
        layer, _, sublayer = str(module).partition(".")
        for target in targets:
            path, _, name = target.partition(".*.")
            if not sublayer or name.startswith(f"{sublayer}."):
                names.append(f"{path}.{layer}.{name}")
    return names


def _all_but(modules: Iterable[Module]) -> str:
    """Returns PEFT's ``exclude_modules`` that excludes everything inside the layers except these modules."""
    kept = []
    for module in modules:
        layer, _, part = str(module).partition(".")
        kept.append(rf"{layer}\.(.*\.)?{part}$" if part in TARGETS else rf"{re.escape(str(module))}\.")
    return rf"(.*\.)?layers\.(?!({'|'.join(kept)})).*"
