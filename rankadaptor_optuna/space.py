"""RankSpace: which layers are searched, which ranks they may take, what a rank costs, and the budget."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from rankadaptor_optuna.ranks import Module, Ranks

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

Granularity = Literal["layer", "sublayer"]
SUBLAYERS = ("self_attn", "mlp")  # a layer's two parts, as its modules are named
BUDGET = "budget"  # the constraint's name
_FORMATS = {"layer": 1, "sublayer": 2}
_ROUNDING = 1e-9  # costs may be fractions, and sums of them round
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(\w+)")


class RankSpace:
    """The search space of rank configurations: one rank per searched layer, or sublayer, inside a budget.

    The cost of a configuration is its number of trainable parameters: the sum over layers of rank times the
    layer's cost per rank, fixed layers included. Parameters of a study are named ``layer_00_rank``,
    ``layer_01_rank``, ... after the layer's index in the model.

    With ``granularity="sublayer"`` a layer has two ranks, that of its attention projections and that of its MLP
    projections. A configuration ``{layer index: rank}`` is then ``{"0.self_attn": rank, "0.mlp": rank, ...}``, and
    the parameters are named ``layer_00_self_attn_rank``, ``layer_00_mlp_rank``, ...

    Args:
        n_layers: Number of layers of the model.
        candidates: Ranks that a layer may take: strictly increasing integers, at least 0 (0 = no adapter there),
            at least one of them positive. Default: the paper's {2, 4, 6, 8, 10, 12}.
        budget: Most trainable parameters of a configuration: a number, ``"uniform:R"`` for the cost of rank R in
            every searched layer, or None for no budget.
        layers: Indices of the searched layers, increasing. Default: all of them.
        costs: Trainable parameters per rank of each searched layer (or sublayer, as ``modules`` has them).
            Default: 1 each.
        fixed_ranks: Ranks of layers that are adapted but not searched, by layer index.
        fixed_cost: Trainable parameters of the fixed layers.
        profile: What pruning took from each searched layer (or sublayer), as a share in [0, 1]. Default: unknown
            (zeros).
        granularity: What has a rank of its own: ``"layer"`` or ``"sublayer"``.

    Attributes:
        modules: What has a rank of its own, in depth order: the keys of a configuration.

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
        granularity: Granularity = "layer",
    ) -> None:
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {n_layers}.")
        if granularity not in _FORMATS:
            raise ValueError(f'granularity must be "layer" or "sublayer", got {granularity!r}.')
        self.granularity = granularity
        self.n_layers = int(n_layers)
        self.layers = tuple(range(n_layers)) if layers is None else tuple(int(i) for i in layers)
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be increasing and not empty, got {list(self.layers)}.")
        if self.layers[0] < 0 or self.layers[-1] >= n_layers:
            raise ValueError(f"layers must lie in 0..{n_layers - 1}, got {list(self.layers)}.")
        self.modules: tuple[Module, ...] = self._modules_of(self.layers)
        self.candidates = checked_candidates(candidates)
        n = len(self.modules)
        self.costs = tuple(float(c) for c in costs) if costs is not None else (1.0,) * n
        self.profile = tuple(float(p) for p in profile) if profile is not None else (0.0,) * n
        for name, values in (("costs", self.costs), ("profile", self.profile)):
            if len(values) != n:
                raise ValueError(f"{name} needs one value per searched {granularity} ({n}), got {len(values)}.")
        if min(self.costs) <= 0:
            raise ValueError(f"costs must be positive, got {min(self.costs)}.")
        self.fixed_ranks = {int(i): int(r) for i, r in (fixed_ranks or {}).items()}
        self.fixed_cost = float(fixed_cost)
        self.budget = self._parse_budget(budget)
        cheapest = self.cost(Ranks.uniform(self.modules, self.candidates[0]))
        if not self.is_within_budget(cheapest):
            raise ValueError(
                f"budget {self.budget:,.0f} is below the cheapest configuration: rank {self.candidates[0]} in every "
                f"layer costs {cheapest:,.0f}. Raise the budget or add a smaller candidate."
            )

    def _modules_of(self, layers: Iterable[int]) -> tuple[Module, ...]:
        if self.granularity == "layer":
            return tuple(layers)
        return tuple(f"{layer}.{sublayer}" for layer in layers for sublayer in SUBLAYERS)

    @property
    def series(self) -> dict[str, slice]:
        """The ranks along the depth: where those of each sublayer stand in ``modules``, or of the layers as ``""``."""
        names = ("",) if self.granularity == "layer" else SUBLAYERS
        return {name: slice(i, None, len(names)) for i, name in enumerate(names)}

    def _parse_budget(self, budget: float | str | None) -> float | None:
        if budget is None:
            return None
        text = str(budget)
        try:
            if text.startswith("uniform:"):
                rank = float(text.removeprefix("uniform:"))
                value = self.cost(dict.fromkeys(self.modules, rank))
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
        granularity: Granularity = "layer",
    ) -> RankSpace:
        """Reads layers, costs and the layer profile off a (pruned) model.

        A layer is any module path ``...layers.<i>...``, a sublayer ``...layers.<i>.self_attn...`` or
        ``...layers.<i>.mlp...``; its cost per rank is the sum of in + out features over its adapted linear modules; its
        profile is the share of linear weights it lacks against the largest layer (or sublayer of its kind).

        Args:
            model: A ``torch.nn.Module``, or anything with such a ``.model`` (a ``PrunedModel``).
            candidates: See the class.
            budget: See the class. Default: the cost of rank 8 in every searched layer.
            unpruned_rank: Rank of layers from which pruning took nothing; they are not searched (the paper fixes
                them at 8). None searches every layer. Where pruning took nothing anywhere, all are searched. Of a
                layer that lost something, both sublayers are searched.
            targets: Last path components of the adapted modules. Default: every linear module of a layer.
            granularity: See the class.

        Raises:
            ValueError: The model has no ``layers.<i>`` with linear modules of these names, or, by sublayers, a layer
                has none in one of them or some outside of both.
        """
        if not hasattr(model, "named_modules"):
            model = model.model
        wanted = None if targets is None else set(targets)
        costs: dict[tuple[int, str], int] = {}  # by layer and, where they are told apart, sublayer
        weights: dict[tuple[int, str], int] = {}
        for name, module in model.named_modules():
            match = _LAYER.search(name)
            if match is None or not hasattr(module, "in_features"):
                continue
            part = int(match[1]), match[2] if granularity == "sublayer" else ""
            weights[part] = weights.get(part, 0) + module.in_features * module.out_features
            if wanted is None or name.rpartition(".")[2] in wanted:
                costs[part] = costs.get(part, 0) + module.in_features + module.out_features
        if not costs:
            names = "linear modules" if wanted is None else f"modules named {sorted(wanted)}"
            raise ValueError(f"{type(model).__name__} has no {names} below 'layers.<i>.'; nothing to adapt.")
        layers = sorted({layer for layer, _ in costs})
        sublayers = SUBLAYERS if granularity == "sublayer" else ("",)
        odd = sorted(costs.keys() ^ {(layer, sublayer) for layer in layers for sublayer in sublayers})
        if odd:
            raise ValueError(
                f"each layer needs modules to adapt in {' and '.join(SUBLAYERS)} and nowhere else, which is not so for "
                f"{['.'.join(map(str, part)) for part in odd[:3]]}; adapt others, or use granularity='layer'."
            )
        largest = {kind: max(n for (_, its), n in weights.items() if its == kind) for kind in sublayers}
        lost = {(layer, kind): 1 - weights[layer, kind] / largest[kind] for layer, kind in costs}
        damaged = {layer for (layer, _), share in lost.items() if share > 0 or unpruned_rank is None}
        searched = sorted(damaged) or layers
        fixed = {} if unpruned_rank is None else {i: unpruned_rank for i in layers if i not in searched}
        parts = [(layer, sublayer) for layer in searched for sublayer in sublayers]
        return cls(
            max(layers) + 1,
            candidates,
            budget,
            layers=searched,
            costs=[costs[part] for part in parts],
            fixed_ranks=fixed,
            fixed_cost=sum(fixed.get(layer, 0) * cost for (layer, _), cost in costs.items()),
            profile=[lost[part] for part in parts],
            granularity=granularity,
        )

    def by_module(self, values: Mapping[str, float]) -> dict[Any, float]:
        """Sums of what the model's modules have, by their names, over each searched layer (or sublayer)."""
        found = dict.fromkeys(self.modules, 0.0)
        for name, value in values.items():
            match = _LAYER.search(name)
            if match is not None:
                module = int(match[1]) if self.granularity == "layer" else f"{match[1]}.{match[2]}"
                if module in found:
                    found[module] += value
        return found

    def name(self, module: Module) -> str:
        """Name of the study parameter that holds the rank of a layer, or of one of its sublayers."""
        layer, *sublayer = str(module).split(".")
        return "_".join(["layer", layer.zfill(max(2, len(str(self.n_layers - 1)))), *sublayer, "rank"])

    def distributions(self) -> dict[str, BaseDistribution]:
        """Optuna distributions by parameter name: integers with a step where the candidates are evenly spaced."""
        steps = {b - a for a, b in zip(self.candidates, self.candidates[1:], strict=False)} or {1}
        distribution: BaseDistribution
        if len(steps) == 1:
            distribution = IntDistribution(self.candidates[0], self.candidates[-1], step=steps.pop())
        else:
            distribution = CategoricalDistribution(self.candidates)
        return {self.name(module): distribution for module in self.modules}

    @property
    def names(self) -> dict[str, Module]:
        """The study parameters that hold the ranks, in depth order: ``{parameter name: module}``."""
        return {self.name(module): module for module in self.modules}

    def to_params(self, ranks: Mapping[Any, int]) -> dict[str, int]:
        """A configuration as study parameters."""
        return {name: ranks[module] for name, module in self.names.items()}

    def to_ranks(self, params: Mapping[str, Any]) -> Ranks:
        """The configuration in study parameters; others than ranks are ignored."""
        return Ranks({module: params[name] for name, module in self.names.items()})

    def suggest(self, trial: BaseTrial) -> Ranks:
        """Asks ``trial`` for a rank per searched layer, ``{layer index: rank}``, or sublayer, ``{"0.mlp": rank}``.

        With ``RankAdaptorSampler`` the budget holds by construction. Another sampler may exceed it; such a trial is
        marked infeasible with the constraint ``budget`` (parameters over the budget), as Optuna's users expect (not
        before Optuna 5, where only samplers set constraints).
        """
        params: dict[str, int] = {}
        for name, dist in self.distributions().items():
            if isinstance(dist, IntDistribution):
                params[name] = trial.suggest_int(name, dist.low, dist.high, step=dist.step)
            else:
                params[name] = trial.suggest_categorical(name, self.candidates)
        ranks = self.to_ranks(params)
        if self.budget is not None and not self.is_feasible(ranks) and hasattr(trial, "set_constraint"):
            trial.set_constraint(BUDGET, self.cost(ranks) - self.budget)
        return ranks

    def cost(self, ranks: Mapping[Any, float]) -> float:
        """Trainable parameters of a configuration as ``suggest`` returns it, fixed layers included.

        Raises:
            ValueError: A searched layer, or sublayer, has no rank.
        """
        self._check(ranks)
        searched = sum(ranks[module] * cost for module, cost in zip(self.modules, self.costs, strict=True))
        return searched + self.fixed_cost

    def _check(self, ranks: Mapping[Any, float]) -> None:
        missing = [module for module in self.modules if module not in ranks]
        if missing:
            kind = f"{self.granularity}s"
            raise ValueError(f"no rank for {kind} {missing}; give one for each of {list(self.modules)}.")

    def is_feasible(self, ranks: Mapping[Any, int]) -> bool:
        """Whether every rank is a candidate and the cost is within the budget."""
        allowed = all(ranks.get(module) in self.candidates for module in self.modules)
        return allowed and self.is_within_budget(self.cost(ranks))

    def is_within_budget(self, cost: float) -> bool:
        """Whether a configuration of this cost (``cost``) keeps the budget; the one comparison, and its tolerance."""
        return cost - self.fixed_cost <= self.searched_budget

    @property
    def searched_budget(self) -> float:
        """The budget less the cost of the fixed layers, with the tolerance for rounding; infinite without a budget."""
        return math.inf if self.budget is None else self.budget * (1 + _ROUNDING) - self.fixed_cost

    def uniform(self) -> Ranks:
        """The reference: the largest candidate that fits the budget in every searched layer alike."""
        configurations = (Ranks.uniform(self.modules, rank) for rank in reversed(self.candidates))
        return next(ranks for ranks in configurations if self.is_feasible(ranks))

    def with_fixed(self, ranks: Mapping[Any, int]) -> Ranks:
        """The ranks of all adapted layers (or sublayers): the searched ones as given, and the fixed ones.

        Raises:
            ValueError: A searched layer, or sublayer, has no rank.
        """
        self._check(ranks)
        found = {module: rank for layer, rank in self.fixed_ranks.items() for module in self._modules_of([layer])}
        found |= {module: int(ranks[module]) for module in self.modules}
        return Ranks({module: found[module] for module in self._modules_of(sorted({*self.fixed_ranks, *self.layers}))})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able description; ``from_dict`` reads it back."""
        described = {
            "format": _FORMATS[self.granularity],
            "n_layers": self.n_layers,
            "candidates": list(self.candidates),
            "budget": self.budget,
            "layers": list(self.layers),
            "costs": list(self.costs),
            "fixed_ranks": {str(i): r for i, r in self.fixed_ranks.items()},
            "fixed_cost": self.fixed_cost,
            "profile": [round(p, 6) for p in self.profile],
        }
        # a space of layers reads as it always did, also to workers of an earlier version
        return described if self.granularity == "layer" else {**described, "granularity": self.granularity}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> RankSpace:
        """Reads what ``to_dict`` wrote.

        Raises:
            ValueError: The description is of a newer format, or not one of a space.
        """
        fields = dict(d)
        formats = " or ".join(map(str, _FORMATS.values()))
        if fields.pop("format", None) not in _FORMATS.values():
            raise ValueError(f"not a rank space of format {formats}: {dict(d)!r:.80}.")
        try:
            return cls(**fields)
        except TypeError as error:
            raise ValueError(f"not a rank space of format {formats}: {error}.") from None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankSpace) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash((self.modules, self.candidates, self.budget))

    def __repr__(self) -> str:
        budget = "no budget" if self.budget is None else f"budget {self.budget:,.0f}"
        what = "layers" if self.granularity == "layer" else "layers by sublayer"
        return f"RankSpace({len(self.layers)} of {self.n_layers} {what}, candidates {self.candidates}, {budget})"


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
