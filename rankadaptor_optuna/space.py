"""RankSpace: which layers are searched, which ranks they may take, what a rank costs, and the budget."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

BUDGET = "budget"  # the constraint's name
_FORMAT = 1
_ROUNDING = 1e-9  # costs may be fractions, and sums of them round
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")


class RankSpace:
    """The search space of rank configurations: one rank per searched layer, inside a budget.

    The cost of a configuration is its number of trainable parameters: the sum over layers of rank times the
    layer's cost per rank, fixed layers included. Parameters of a study are named ``layer_00_rank``,
    ``layer_01_rank``, ... after the layer's index in the model.

    Args:
        n_layers: Number of layers of the model.
        candidates: Ranks that a layer may take: strictly increasing integers, at least 0 (0 = no adapter there),
            at least one of them positive. Default: the paper's {2, 4, 6, 8, 10, 12}.
        budget: Most trainable parameters of a configuration: a number, ``"uniform:R"`` for the cost of rank R in
            every searched layer, or None for no budget.
        layers: Indices of the searched layers, increasing. Default: all of them.
        costs: Trainable parameters per rank of each searched layer. Default: 1 each.
        fixed_ranks: Ranks of layers that are adapted but not searched.
        fixed_cost: Trainable parameters of the fixed layers.
        profile: What pruning took from each searched layer, as a share in [0, 1]. Default: unknown (zeros).

    Raises:
        ValueError: An argument is out of range, or no configuration fits the budget.
    """

    def __init__(
        self,
        n_layers: int,
        candidates: Sequence[int] = (2, 4, 6, 8, 10, 12),
        budget: float | str | None = None,
        *,
        layers: Sequence[int] | None = None,
        costs: Sequence[float] | None = None,
        fixed_ranks: Mapping[int, int] | None = None,
        fixed_cost: float = 0,
        profile: Sequence[float] | None = None,
    ) -> None:
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {n_layers}.")
        self.n_layers = int(n_layers)
        self.layers = tuple(range(n_layers)) if layers is None else tuple(int(i) for i in layers)
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be increasing and not empty, got {list(self.layers)}.")
        if self.layers[0] < 0 or self.layers[-1] >= n_layers:
            raise ValueError(f"layers must lie in 0..{n_layers - 1}, got {list(self.layers)}.")
        self.candidates = checked_candidates(candidates)
        self.costs = tuple(float(c) for c in costs) if costs is not None else (1.0,) * len(self.layers)
        self.profile = tuple(float(p) for p in profile) if profile is not None else (0.0,) * len(self.layers)
        for name, values in (("costs", self.costs), ("profile", self.profile)):
            if len(values) != len(self.layers):
                raise ValueError(f"{name} needs one value per searched layer ({len(self.layers)}), got {len(values)}.")
        if min(self.costs) <= 0:
            raise ValueError(f"costs must be positive, got {min(self.costs)}.")
        self.fixed_ranks = {int(i): int(r) for i, r in (fixed_ranks or {}).items()}
        self.fixed_cost = float(fixed_cost)
        self.budget = self._parse_budget(budget)
        cheapest = self.cost(dict.fromkeys(self.layers, self.candidates[0]))
        if self.budget is not None and cheapest > self.budget:
            raise ValueError(
                f"budget {self.budget:,.0f} is below the cheapest configuration: rank {self.candidates[0]} in every "
                f"layer costs {cheapest:,.0f}. Raise the budget or add a smaller candidate."
            )

    def _parse_budget(self, budget: float | str | None) -> float | None:
        if budget is None:
            return None
        text = str(budget)
        try:
            if text.startswith("uniform:"):
                rank = float(text.removeprefix("uniform:"))
                value = self.cost(dict.fromkeys(self.layers, rank))
            else:
                value = float(text)
        except ValueError:
            raise ValueError(f'budget must be a number or "uniform:RANK", got {budget!r}.') from None
        if not 0 < value < float("inf"):
            raise ValueError(f"budget must be positive and finite, got {budget!r}.")
        return value

    @classmethod
    def from_model(
        cls,
        model: Any,  # noqa: ANN401
        candidates: Sequence[int] = (2, 4, 6, 8, 10, 12),
        budget: float | str | None = "uniform:8",
        *,
        unpruned_rank: int | None = 8,
        targets: Iterable[str] | None = None,
    ) -> RankSpace:
        """Reads layers, costs and the layer profile off a (pruned) model.

        A layer is any module path ``...layers.<i>...``; its cost per rank is the sum of in + out features over its
        adapted linear modules; its profile is the share of linear weights it lacks against the largest layer.

        Args:
            model: A ``torch.nn.Module``, or anything with such a ``.model`` (a ``PrunedModel``).
            candidates: See the class.
            budget: See the class. Default: the cost of rank 8 in every searched layer.
            unpruned_rank: Rank of layers from which pruning took nothing; they are not searched (the paper fixes
                them at 8). None searches every layer. Where pruning took nothing anywhere, all are searched.
            targets: Last path components of the adapted modules. Default: every linear module of a layer.

        Raises:
            ValueError: The model has no ``layers.<i>`` with linear modules of these names.
        """
        if not hasattr(model, "named_modules"):
            model = model.model
        wanted = None if targets is None else set(targets)
        costs: dict[int, int] = {}
        weights: dict[int, int] = {}
        for name, module in model.named_modules():
            match = _LAYER.search(name)
            if match is None or not hasattr(module, "in_features"):
                continue
            layer = int(match[1])
            weights[layer] = weights.get(layer, 0) + module.in_features * module.out_features
            if wanted is None or name.rpartition(".")[2] in wanted:
                costs[layer] = costs.get(layer, 0) + module.in_features + module.out_features
        if not costs:
            names = "linear modules" if wanted is None else f"modules named {sorted(wanted)}"
            raise ValueError(f"{type(model).__name__} has no {names} below 'layers.<i>.'; nothing to adapt.")
        largest = max(weights.values())
        lost = {layer: 1 - weights[layer] / largest for layer in costs}
        searched = sorted(layer for layer in costs if unpruned_rank is None or lost[layer] > 0) or sorted(costs)
        fixed = {} if unpruned_rank is None else {i: unpruned_rank for i in sorted(costs) if i not in searched}
        return cls(
            max(costs) + 1,
            candidates,
            budget,
            layers=searched,
            costs=[costs[i] for i in searched],
            fixed_ranks=fixed,
            fixed_cost=sum(rank * costs[i] for i, rank in fixed.items()),
            profile=[lost[i] for i in searched],
        )

    def name(self, layer: int) -> str:
        """Name of the study parameter that holds the rank of ``layer``."""
        return f"layer_{layer:0{max(2, len(str(self.n_layers - 1)))}d}_rank"

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna distributions by parameter name: integers with a step where the candidates are evenly spaced."""
        steps = {b - a for a, b in zip(self.candidates, self.candidates[1:], strict=False)} or {1}
        distribution: BaseDistribution
        if len(steps) == 1:
            distribution = IntDistribution(self.candidates[0], self.candidates[-1], step=steps.pop())
        else:
            distribution = CategoricalDistribution(self.candidates)
        return {self.name(layer): distribution for layer in self.layers}

    def suggest(self, trial: BaseTrial) -> dict[int, int]:
        """Asks ``trial`` for a rank per searched layer: ``{layer index: rank}``.

        With ``RankAdaptorSampler`` the budget holds by construction. Another sampler may exceed it; such a trial is
        marked infeasible with the constraint ``budget`` (parameters over the budget), as Optuna's users expect (not
        before Optuna 5, where only samplers set constraints).
        """
        ranks = {}
        for layer, (name, dist) in zip(self.layers, self.distributions().items(), strict=True):
            if isinstance(dist, IntDistribution):
                ranks[layer] = trial.suggest_int(name, dist.low, dist.high, step=dist.step)
            else:
                ranks[layer] = int(trial.suggest_categorical(name, self.candidates))
        if self.budget is not None and not self.is_feasible(ranks) and hasattr(trial, "set_constraint"):
            trial.set_constraint(BUDGET, self.cost(ranks) - self.budget)
        return ranks

    def cost(self, ranks: Mapping[int, float]) -> float:
        """Trainable parameters of a configuration ``{layer index: rank}``, fixed layers included.

        Raises:
            ValueError: A searched layer has no rank.
        """
        missing = [layer for layer in self.layers if layer not in ranks]
        if missing:
            raise ValueError(f"no rank for layers {missing}; give one for each of {list(self.layers)}.")
        searched = sum(ranks[layer] * cost for layer, cost in zip(self.layers, self.costs, strict=True))
        return searched + self.fixed_cost

    def is_feasible(self, ranks: Mapping[int, int]) -> bool:
        """Whether every rank is a candidate and the cost is within the budget."""
        allowed = all(ranks.get(layer) in self.candidates for layer in self.layers)
        return allowed and (self.budget is None or self.cost(ranks) <= self.budget * (1 + _ROUNDING))

    def uniform(self) -> dict[int, int]:
        """The reference: the largest candidate that fits the budget in every searched layer alike."""
        configurations = (dict.fromkeys(self.layers, rank) for rank in reversed(self.candidates))
        return next(ranks for ranks in configurations if self.is_feasible(ranks))

    def with_fixed(self, ranks: Mapping[int, int]) -> dict[int, int]:
        """The ranks of all adapted layers: the searched ones as given, and the fixed ones."""
        return dict(sorted({**self.fixed_ranks, **{layer: int(ranks[layer]) for layer in self.layers}}.items()))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; ``from_dict`` reads it back."""
        return {
            "format": _FORMAT,
            "n_layers": self.n_layers,
            "candidates": list(self.candidates),
            "budget": self.budget,
            "layers": list(self.layers),
            "costs": list(self.costs),
            "fixed_ranks": {str(i): r for i, r in self.fixed_ranks.items()},
            "fixed_cost": self.fixed_cost,
            "profile": [round(p, 6) for p in self.profile],
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> RankSpace:
        """Reads what ``to_dict`` wrote.

        Raises:
            ValueError: The description is of a newer format, or not one of a space.
        """
        fields = dict(d)
        if fields.pop("format", None) != _FORMAT:
            raise ValueError(f"not a rank space of format {_FORMAT}: {dict(d)!r:.80}.")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a rank space of format {_FORMAT}: {error}.") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankSpace) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.layers, self.candidates, self.budget))

    def __repr__(self) -> str:
        budget = "no budget" if self.budget is None else f"budget {self.budget:,.0f}"
        return f"RankSpace({len(self.layers)} of {self.n_layers} layers, candidates {self.candidates}, {budget})"


def checked_candidates(candidates: Sequence[int]) -> tuple[int, ...]:
    """The candidates as a tuple of integers.

    Raises:
        ValueError: They are empty, not integers, not strictly increasing, negative, or only 0.
    """
    values = tuple(candidates)
    if not values:
        raise ValueError("candidates must not be empty: give the ranks that a layer may take, e.g. (2, 4, 8).")
    if any(isinstance(c, bool) or not isinstance(c, (int, np.integer)) for c in values):
        raise ValueError(f"candidates must be integers, got {list(values)}.")
    if list(values) != sorted(set(values)):
        raise ValueError(f"candidates must be strictly increasing, got {list(values)}.")
    if values[0] < 0 or values[-1] <= 0:
        raise ValueError(f"candidates must be positive (0 is allowed and means no adapter), got {list(values)}.")
    return tuple(int(c) for c in values)
