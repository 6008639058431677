"""RankSpace: the searched layers, their candidate ranks, the cost of a rank, and the budget."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution

from rankadaptor_optuna.llm.layers import SUBLAYERS, layer_of, module_of, modules_of, read_layers
from rankadaptor_optuna.llm.layers import Granularity as Granularity
from rankadaptor_optuna.ranks import TARGETS, Module, Ranks, layers_path

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

BUDGET = "rankadaptor:budget"  # name of the constraint that marks trials over the budget
_FORMATS = {"layer": 1, "sublayer": 2}  # of to_dict
_MOST_LAYERS = 100_000  # of a stored description; set by hand
_ROUNDING = 1e-9  # relative tolerance of the budget: sums of fractional costs round; set by hand


class RankSpace:
    """The search space of rank configurations: one rank per searched layer, or sublayer, within a budget.

    The cost of a configuration is its number of trainable parameters: the sum over layers of rank times the
    layer's cost per rank, fixed layers included. Parameters of a study are named ``layer_00_rank``,
    ``layer_01_rank``, ... after the layer's index in the model, or by ``name``.

    With ``granularity="sublayer"`` a layer has two ranks: one of its attention projections and one of its MLP
    projections. A configuration ``{layer index: rank}`` is then ``{"0.self_attn": rank, "0.mlp": rank, ...}``, and
    the parameters are named ``layer_00_self_attn_rank``, ``layer_00_mlp_rank``, ...

    Args:
        n_layers: Number of layers of the model.
        candidates: Ranks that a layer may take: strictly increasing integers, at least 0 (0 = no adapter there),
            at least one of them positive. Default: the paper's {2, 4, 6, 8, 10, 12}.
        budget: Most trainable parameters of a configuration: a number, ``"uniform:R"`` for the cost of rank R in
            every searched layer, or None for no budget.
        layers: Indices of the searched layers, increasing. Default: all layers.
        costs: Trainable parameters per rank of each searched layer (or sublayer, in the order of ``modules``).
            Default: 1 each.
        fixed_ranks: Ranks of layers that are adapted but not searched, by layer index.
        fixed_cost: Trainable parameters of the fixed layers.
        profile: Share of each searched layer (or sublayer) that pruning removed, in [0, 1]. Default: unknown (zeros).
        granularity: Whether each ``"layer"`` or each ``"sublayer"`` has a rank.
        targets: Names of the adapted modules, see ``LoraSettings``. Default: not known.
        name: Template of the parameters' names: a format string of the layer's index (and of the sublayer's name), like
            ``"layer_{}_rank"`` (``"layer_{}_{}_rank"``). Default: the names above.

    Attributes:
        modules: The searched layers or sublayers in depth order: the keys of a configuration.

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
        targets: Sequence[str] | None = None,
        name: str | None = None,
    ) -> None:
        if isinstance(n_layers, bool) or not isinstance(n_layers, (int, np.integer)):
            raise ValueError(f"n_layers must be an integer, got {n_layers!r}.")
        lists: dict[str, object] = {"candidates": candidates, "layers": layers, "costs": costs, "profile": profile}
        for argument, given in lists.items():
            if given is not None and (isinstance(given, str) or not isinstance(given, Iterable)):
                raise ValueError(f"{argument} must be a list of numbers, got {given!r}.")
        if isinstance(targets, str):
            raise ValueError(f"targets must be a list of names, got {targets!r}.")
        if n_layers < 1:
            raise ValueError(f"n_layers must be at least 1, got {n_layers}.")
        if granularity not in _FORMATS:
            raise ValueError(f'granularity must be "layer" or "sublayer", got {granularity!r}.')
        self.granularity = granularity
        self.targets = None if targets is None else tuple(targets)
        self.n_layers = int(n_layers)
        self.layers = tuple(range(n_layers)) if layers is None else tuple(int(i) for i in layers)
        if not self.layers or list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must be increasing and not empty, got {list(self.layers)}.")
        if self.layers[0] < 0 or self.layers[-1] >= n_layers:
            raise ValueError(f"layers must lie in 0..{n_layers - 1}, got {list(self.layers)}.")
        self.modules: tuple[Module, ...] = modules_of(self.layers, granularity)
        self.candidates = checked_candidates(candidates)
        n = len(self.modules)
        self.costs = tuple(float(c) for c in costs) if costs is not None else (1.0,) * n
        self.profile = tuple(float(p) for p in profile) if profile is not None else (0.0,) * n
        for argument, values in (("costs", self.costs), ("profile", self.profile)):
            if len(values) != n:
                raise ValueError(f"{argument} needs one value per searched {granularity} ({n}), got {len(values)}.")
            if not all(map(math.isfinite, values)):
                raise ValueError(f"{argument} must be finite, got {list(values)!s:.80}.")
        if min(self.costs) <= 0:
            raise ValueError(f"costs must be positive, got {min(self.costs)}.")
        self.fixed_ranks = {int(i): int(r) for i, r in (fixed_ranks or {}).items()}
        self.fixed_cost = float(fixed_cost)
        if not 0 <= self.fixed_cost < math.inf:
            raise ValueError(f"fixed_cost must be finite and at least 0, got {fixed_cost}.")
        wrong = {i: r for i, r in self.fixed_ranks.items() if i in self.layers or not 0 <= i < n_layers or r < 0}
        if wrong:
            raise ValueError(f"fixed_ranks must be ranks, at least 0, of layers that are not searched, got {wrong}.")
        self._template = self._checked_template(name)
        self.budget = self._parse_budget(budget)
        cheapest = self.cost(Ranks.uniform(self.modules, self.candidates[0]))
        if not self.is_within_budget(cheapest):
            raise ValueError(
                f"budget {self.budget:,.0f} is below the cheapest configuration: rank {self.candidates[0]} in every "
                f"layer costs {cheapest:,.0f}. Raise the budget or add a smaller candidate."
            )

    @property
    def series(self) -> dict[str, slice]:
        """Positions in ``modules`` of each sublayer's ranks along the depth, or of all layers' ranks as ``""``."""
        names = ("",) if self.granularity == "layer" else SUBLAYERS
        return {name: slice(i, None, len(names)) for i, name in enumerate(names)}

    def _checked_template(self, template: str | None) -> str | None:
        if template is None:
            return None
        try:
            names = {str(template).format(layer_of(module), *str(module).split(".")[1:]) for module in self.modules}
        except (LookupError, ValueError):
            names = set()
        if len(names) != len(self.modules):
            example = "layer_{}_rank" if self.granularity == "layer" else "layer_{}_{}_rank"
            raise ValueError(f'name must tell every {self.granularity} apart, like "{example}", got {template!r}.')
        return str(template)

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
        """Makes the space of a (pruned) model: its layers, their costs and the layer profile.

        A layer is a block of the text decoder's list of layers, a sublayer its ``self_attn`` or its ``mlp``. Its cost
        per rank is the sum of in + out features over its adapted linear modules. Its profile is the share of linear
        weights missing against the largest layer (or sublayer of its kind), relative to the shapes that the model's
        configuration gives them. A warning names linear modules that get no adapter, such as those of a vision tower.

        Args:
            model: A ``torch.nn.Module``, or anything with such a ``.model`` (a ``PrunedModel``).
            candidates: See the class.
            budget: See the class. Default: the cost of rank 8 in every searched layer.
            unpruned_rank: Rank of the layers from which pruning removed nothing, which are not searched (8 in the
                paper). None searches every layer; so does a model without pruned layers. Both sublayers of a pruned
                layer are searched.
            targets: Names of the adapted modules (ends of their dotted names); each must exist. LLaMA's seven names
                stand for every linear module where one is missing. Default: every linear module of a layer.
            granularity: See the class.

        Raises:
            ValueError: The model cannot be adapted (``read_layers``), or its layers differ for an unknown reason and
                ``unpruned_rank`` is not None.
        """
        model = model if hasattr(model, "named_modules") else model.model
        found = read_layers(model, targets, granularity)
        for note in found.notes:
            warnings.warn(f"{type(model).__name__}: {note}.", stacklevel=2)
        removed = found.removed or dict.fromkeys(found.costs, 0.0)
        if found.removed is None and unpruned_rank is not None:
            raise ValueError(
                f"the layers of {type(model).__name__} have different modules, and its configuration does not tell "
                "whether pruning did this; pass unpruned_rank=None (in a recipe -1) to search all layers."
            )
        pruned = {layer_of(module) for module, share in removed.items() if share > 0 or unpruned_rank is None}
        searched = sorted(pruned) or found.layers
        fixed = {} if unpruned_rank is None else {i: unpruned_rank for i in found.layers if i not in searched}
        modules = modules_of(searched, granularity)
        space = cls(
            max(found.layers) + 1,
            candidates,
            budget,
            layers=searched,
            costs=[found.costs[module] for module in modules],
            fixed_ranks=fixed,
            fixed_cost=sum(fixed.get(layer_of(module), 0) * cost for module, cost in found.costs.items()),
            profile=[removed[module] for module in modules],
            granularity=granularity,
            targets=found.targets,
        )
        if (space.budget or 0) > space.costliest:
            most = f"rank {space.candidates[-1]} in every layer ({space.costliest:,.0f} parameters)"
            warnings.warn(
                f"budget {budget} exceeds the costliest configuration, {most}: it limits nothing.", stacklevel=2
            )
        return space

    def by_module(self, values: Mapping[str, float]) -> dict[Any, float]:
        """Returns the sum of values over each searched layer (or sublayer), given values by submodule name."""
        sums: dict[Any, float] = dict.fromkeys(self.modules, 0.0)
        for name, value in values.items():
            if (module := module_of(name, self.granularity, layers_path(self.targets or ()))) in sums:
                sums[module] += value
        return sums

    def name(self, module: Module) -> str:
        """Returns the name of the study parameter that holds the rank of a layer, or of one of its sublayers."""
        layer, *sublayer = str(module).split(".")
        if self._template is not None:
            return self._template.format(int(layer), *sublayer)
        return "_".join(["layer", layer.zfill(max(2, len(str(self.n_layers - 1)))), *sublayer, "rank"])

    def distributions(self) -> dict[str, BaseDistribution]:
        """Returns Optuna's distributions by parameter name: integers with a step for evenly spaced candidates."""
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
        """Returns a configuration as study parameters."""
        return {name: ranks[module] for name, module in self.names.items()}

    def to_ranks(self, params: Mapping[str, Any]) -> Ranks:
        """Returns the configuration in study parameters, of which those that are no ranks are ignored."""
        return Ranks({module: params[name] for name, module in self.names.items()})

    def suggest(self, trial: BaseTrial) -> Ranks:
        """Asks ``trial`` for a rank per searched layer, ``{layer index: rank}``, or sublayer, ``{"0.mlp": rank}``.

        With ``RankAdaptorSampler`` the budget holds by construction. For other samplers the trial gets the constraint
        ``rankadaptor:budget``, parameters over the budget (needs Optuna 5).
        """
        params: dict[str, int] = {}
        for name, dist in self.distributions().items():
            if isinstance(dist, IntDistribution):
                params[name] = trial.suggest_int(name, dist.low, dist.high, step=dist.step)
            else:
                params[name] = trial.suggest_categorical(name, self.candidates)
        ranks = self.to_ranks(params)
        if self.budget is not None and hasattr(trial, "set_constraint"):
            cost = self.cost(ranks)
            over = cost - self.budget
            trial.set_constraint(BUDGET, min(over, 0.0) if self.is_within_budget(cost) else over)
        return ranks

    def cost(self, ranks: Mapping[Any, float]) -> float:
        """Returns the trainable parameters of a configuration, fixed layers included.

        Raises:
            ValueError: A searched layer, or sublayer, has no rank.
        """
        self._check(ranks)
        searched = sum(ranks[module] * cost for module, cost in zip(self.modules, self.costs, strict=True))
        return searched + self.fixed_cost

    @property
    def costliest(self) -> float:
        """The cost of the largest candidate in every searched layer."""
        return self.cost(Ranks.uniform(self.modules, self.candidates[-1]))

    def _check(self, ranks: Mapping[Any, float]) -> None:
        missing = [module for module in self.modules if module not in ranks]
        if missing:
            raise ValueError(f"no rank for {self.granularity}s {missing}; give one for each of {list(self.modules)}.")

    def is_feasible(self, ranks: Mapping[Any, int]) -> bool:
        """Returns whether every rank is a candidate and the cost is within the budget."""
        allowed = all(ranks.get(module) in self.candidates for module in self.modules)
        return allowed and self.is_within_budget(self.cost(ranks))

    def is_within_budget(self, cost: float) -> bool:
        """Returns whether a cost, as ``cost`` returns it, is within the budget, up to a relative rounding of 1e-9."""
        return cost - self.fixed_cost <= self.searched_budget

    @property
    def searched_budget(self) -> float:
        """The budget less the cost of the fixed layers, with the tolerance for rounding; infinite without a budget."""
        return math.inf if self.budget is None else self.budget * (1 + _ROUNDING) - self.fixed_cost

    def uniform(self) -> Ranks:
        """Returns the uniform configuration: the largest candidate that fits the budget in every searched layer."""
        configurations = (Ranks.uniform(self.modules, rank) for rank in reversed(self.candidates))
        return next(ranks for ranks in configurations if self.is_feasible(ranks))

    def with_fixed(self, ranks: Mapping[Any, int]) -> Ranks:
        """Returns the ranks of all adapted layers (or sublayers): the given ranks and the fixed ranks.

        Raises:
            ValueError: A searched layer, or sublayer, has no rank.
        """
        self._check(ranks)
        adapted = modules_of(sorted({*self.fixed_ranks, *self.layers}), self.granularity)
        searched = set(self.modules)
        return Ranks((m, ranks[m] if m in searched else self.fixed_ranks[layer_of(m)]) for m in adapted)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-able description, which ``from_dict`` reads."""
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
        # without these keys, workers of versions that do not know them can read it
        if self.targets is not None and set(self.targets) != set(TARGETS):
            described["targets"] = list(self.targets)
        if self.granularity != "layer":
            described["granularity"] = self.granularity
        return described if self._template is None else {**described, "name": self._template}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> RankSpace:
        """Reads a description that ``to_dict`` returned.

        Raises:
            ValueError: The description has a newer format, or describes no space.
        """
        if not isinstance(d, Mapping):
            raise ValueError(f"not a rank space: {d!r:.80}.")
        fields = dict(d)
        formats = " or ".join(map(str, _FORMATS.values()))
        if fields.pop("format", None) not in _FORMATS.values():
            raise ValueError(f"not a rank space of format {formats}: {dict(d)!r:.80}.")
        if not isinstance(n := fields.get("n_layers"), int) or n > _MOST_LAYERS:
            raise ValueError(
                f"not a rank space of format {formats}: n_layers must be at most {_MOST_LAYERS}, got {n!r:.80}."
            )
        try:
            return cls(**fields)
        except (AttributeError, OverflowError, TypeError) as error:
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
    """Checks candidate ranks and returns them as a tuple of integers.

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
