"""Create or resume a study in a shared database, and say what it found."""

from __future__ import annotations

import json
import os
import random
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import optuna
import sqlalchemy
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.history import History
from rankadaptor_optuna.recovery.lora import alpha_pattern, rank_pattern
from rankadaptor_optuna.sampler import SPACE_ATTR, RankAdaptorSampler
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.surrogate.encoding import Encoding, rank_parameters
from rankadaptor_optuna.surrogate.features import Array, RankGrid
from rankadaptor_optuna.surrogate.model import PerformanceModel
from rankadaptor_optuna.surrogate.prior import Prior
from rankadaptor_optuna.surrogate.search import Allocations

RECIPE_ATTR = "rankadaptor:recipe"
_LOCK = 7_236_117_601  # any number, the same in every worker
_HEARTBEAT_S = 60


def create_study(
    *,
    storage: str | BaseStorage | None = None,
    study_name: str | None = None,
    space: RankSpace | None = None,
    sampler: BaseSampler | None = None,
    direction: Literal["maximize", "minimize"] = "maximize",
    load_if_exists: bool = True,
    recipe: Mapping[str, Any] | None = None,
) -> Study:
    """Creates or resumes a study, safely for workers that start at the same moment on a fresh database.

    A database given by its URL gets Optuna's heartbeat, which queues the trial of a killed worker again.

    Args:
        storage: Any Optuna storage or its URL. Default: in memory.
        study_name: Name of the study. Default: made up by Optuna.
        space: What to search; used for the default sampler.
        sampler: Default: ``RankAdaptorSampler(space)``.
        direction: ``"maximize"`` or ``"minimize"``.
        load_if_exists: Whether to go on with a study of that name.
        recipe: What a trial is (model, pruning, data, training, ...), JSON-able. Stored with the study; a study with
            another recipe is refused, for its trials would not be comparable.

    Raises:
        ValueError: The storage cannot be opened, or the study belongs to another recipe.
    """
    opened = open_storage(storage) if isinstance(storage, str) else storage
    study = optuna.create_study(
        storage=opened,
        study_name=study_name,
        sampler=RankAdaptorSampler(space) if sampler is None else sampler,
        direction=direction,
        load_if_exists=load_if_exists,
    )
    if recipe is not None:
        check_recipe(study, recipe)
        study.set_user_attr(RECIPE_ATTR, dict(recipe))
    return study


def check_recipe(study: Study, recipe: Mapping[str, Any]) -> None:
    """Whether the study's trials are comparable with trials of ``recipe``.

    Raises:
        ValueError: The study belongs to another recipe; the message names what differs.
    """
    stored = study.user_attrs.get(RECIPE_ATTR)
    changed = [] if stored is None else differences(stored, recipe)
    if changed:
        what = "; ".join(changed)
        raise ValueError(
            f"study {study.study_name!r} belongs to other settings: {what}. Use those, or another study name."
        )


def differences(stored: Mapping[str, Any], recipe: Mapping[str, Any]) -> list[str]:
    """What differs between a stored recipe and one as given, which JSON may have made lists of tuples in."""
    now = json.loads(json.dumps(recipe))
    pairs = {key: (stored.get(key), now.get(key)) for key in sorted({*stored, *now})}
    return [f"{key} was {was!s:.60}, now {given!s:.60}" for key, (was, given) in pairs.items() if was != given]


def masked(url: str) -> str:
    """A database URL without its password, for messages."""
    try:
        return sqlalchemy.make_url(url).render_as_string(hide_password=True)
    except (sqlalchemy.exc.ArgumentError, ValueError):  # ValueError: a port that is no number
        return "(not a database URL)"


def open_storage(url: str) -> RDBStorage:
    """Opens a database, creating Optuna's tables at most once however many workers start together.

    Raises:
        ValueError: It cannot be opened; the message carries no password.
    """
    try:
        engine = sqlalchemy.create_engine(url)
        with engine.connect() as connection:
            if engine.dialect.name == "postgresql":  # released with the connection
                connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_lock(_LOCK)))
            elif engine.dialect.name in ("mysql", "mariadb"):
                connection.execute(sqlalchemy.select(sqlalchemy.func.get_lock("rankadaptor", 60)))
            storage = _create_tables(url)
        engine.dispose()
    except (sqlalchemy.exc.SQLAlchemyError, ImportError, RuntimeError, ValueError) as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise ValueError(f"cannot open the storage {masked(url)}: {reason}") from None
    return storage


def _create_tables(url: str) -> RDBStorage:
    for attempt in range(10):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # the heartbeat is one
                retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=1)
                return RDBStorage(url, heartbeat_interval=_HEARTBEAT_S, heartbeat_stale_trial_callback=retry)
        except sqlalchemy.exc.DBAPIError:  # SQLite has no advisory lock: another worker was creating the same table
            if attempt == 9 or not url.startswith("sqlite"):
                raise
            time.sleep(random.uniform(0.05, 0.3))  # noqa: S311
    raise AssertionError("unreachable")


@dataclass(frozen=True)
class Evidence:
    """What a recommendation rests on.

    Attributes:
        n_trials: Finished trials that the performance model learned from.
        gain: Predicted gain over the uniform configuration, in score units, positive is better.
        interval: Its central 95% interval.
        closest: The nearest finished trials: (number, ranks that differ, score).
        statement: The same in one sentence.
    """

    n_trials: int
    gain: float
    interval: tuple[float, float]
    closest: tuple[tuple[int, int, float], ...]
    statement: str


@dataclass(frozen=True)
class Recommendation:
    """The rank configuration that the performance model expects to be best.

    Attributes:
        ranks: Rank of each searched layer, ``{layer index: rank}``, or sublayer, ``{"0.mlp": rank}``; empty where no
            space is known and several rank parameters belong to one layer: see ``params`` then.
        params: The study's parameters with these ranks (and the best other parameters, where there are any).
        predicted: Predicted score.
        std: Standard deviation of that prediction.
        cost: Trainable parameters (sum of ranks where no space is known).
        evidence: What it rests on.
        all_ranks: Also the ranks of adapted layers that were not searched.
    """

    ranks: dict[Any, int]
    params: dict[str, Any]
    predicted: float
    std: float
    cost: float
    evidence: Evidence
    all_ranks: dict[Any, int] = field(repr=False)

    @property
    def rank_pattern(self) -> dict[str, int]:
        """For ``peft.LoraConfig(rank_pattern=...)``; empty where ``ranks`` is."""
        return rank_pattern(self.all_ranks)

    @property
    def alpha_pattern(self) -> dict[str, float]:
        """For ``peft.LoraConfig(alpha_pattern=...)``: alpha proportional to rank."""
        return alpha_pattern(self.all_ranks)


def study_space(study: Study) -> RankSpace | None:
    """The rank space of a study: its sampler's, else the one stored with it."""
    sampler = getattr(study, "sampler", None)
    if isinstance(sampler, RankAdaptorSampler) and sampler.space is not None:
        return sampler.space
    stored = study.user_attrs.get(SPACE_ATTR)
    return None if stored is None else RankSpace.from_dict(stored)


def study_ranks(study: Study, space: RankSpace | None = None) -> dict[str, Any]:
    """The study's rank parameters in depth order, ``{parameter name: layer index}`` (or sublayer)."""
    space = space or study_space(study)
    if space is not None:
        return {space.name(module): module for module in space.modules}
    history = History(study)
    history.refresh()
    return rank_parameters(history.searched)


def finished_trials(study: Study, space: RankSpace | None = None) -> list[FrozenTrial]:
    """Completed trials with a finite score that carry every rank parameter."""
    names = study_ranks(study, space)
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [t for t in complete if np.isfinite(t.values).all() and names.keys() <= t.params.keys()]


def uniform_trials(study: Study) -> list[FrozenTrial]:
    """Finished trials of the uniform configuration: the study's own LoRA reference; none where no space is known."""
    space = study_space(study)
    if space is None:
        return []
    uniform = {space.name(module): rank for module, rank in space.uniform().items()}
    return [t for t in finished_trials(study) if uniform.items() <= t.params.items()]


def recommend(
    study: Study,
    *,
    space: RankSpace | None = None,
    prior: Prior | str | os.PathLike[str] | None = "pretrained",
) -> Recommendation:
    """The configuration with the best posterior mean inside the budget: never just the luckiest trial.

    Args:
        study: A study with one objective; any sampler may have made its trials.
        space: The rank space. Default: the sampler's, else the one stored with the study, else read off the
            parameters' names and ranges, without a budget.
        prior: See ``RankAdaptorSampler``; the prior of the study's own sampler is used where it has one.

    Raises:
        ValueError: Several objectives, no finished trial, or no rank parameters.
    """
    if len(study.directions) > 1:
        raise ValueError(
            f"recommend needs one objective, this study has {len(study.directions)}; see study.best_trials."
        )
    space = space or study_space(study)
    sampler = getattr(study, "sampler", None)
    if isinstance(sampler, RankAdaptorSampler):
        prior = sampler.prior
    names = study_ranks(study, space)
    if not names:
        raise ValueError("the study has no rank parameters: names with a layer number and integer values.")
    if not finished_trials(study, space):
        raise ValueError(f"study {study.study_name!r} has no finished trial yet; run some first.")
    history = History(study)
    history.refresh()
    if space is None:
        encoding = Encoding(history.searched)
    else:
        encoding = Encoding({**history.searched, **space.distributions()}, RankGrid.from_space(space), list(names))
    direction = "minimize" if study.direction is StudyDirection.MINIMIZE else "maximize"
    model = PerformanceModel(encoding.grid, prior=prior, direction=direction, n_ordinary=encoding.width)
    data = history.encoded(encoding, lambda _: model).data()
    model.fit(data.rows, data.values[:, 0], data.variance)
    belief = model.mean()
    budget = None if space is None or space.budget is None else space.budget - space.fixed_cost
    allocations = Allocations.of(encoding.grid, budget)
    chosen = np.asarray(allocations.ranks_of(allocations.best(belief.table)), dtype=np.float64)
    points = np.asarray([encoding.point(t.params) for t in data.trials])
    point = points[belief.of_ordinary(points).argmax()]
    tried = np.asarray([encoding.ranks(t.params) for t in data.trials])

    gain, gain_std = (float(x[0]) for x in model.predict_gain(chosen))
    predicted, std = (float(x[0]) for x in model.predict(chosen, point))
    ranks = {layer: int(rank) for layer, rank in zip(names.values(), chosen, strict=True)}
    if len(ranks) < len(names):
        ranks = {}
    interval = (gain - 1.96 * gain_std, gain + 1.96 * gain_std)
    differing = (tried != chosen).sum(1)
    nearest = np.argsort(differing, kind="stable")[:3]
    return Recommendation(
        ranks=ranks,
        params={**encoding.decode(point), **dict(zip(names, map(int, chosen), strict=True))},
        predicted=predicted,
        std=std,
        cost=float(chosen.sum()) if space is None else space.cost(ranks),
        evidence=Evidence(
            n_trials=len(data.trials),
            gain=gain,
            interval=interval,
            closest=tuple((data.trials[i].number, int(differing[i]), float(data.values[i, 0])) for i in nearest),
            statement=_statement(len(data.trials), gain, interval, chosen, encoding.grid.reference),
        ),
        all_ranks=ranks if space is None else space.with_fixed(ranks),
    )


def _statement(n: int, gain: float, interval: tuple[float, float], chosen: Array, reference: Array) -> str:
    low, high = interval
    uniform = f"rank {reference[0]:g} everywhere" if len(set(reference)) == 1 else "the middle of each rank's range"
    if (chosen == reference).all():
        return f"After {n} trials {uniform} itself is expected to be best."
    detail = f"predicted gain over {uniform} {gain:+.4f}, 95% interval {low:+.4f} to {high:+.4f}, from {n} trials"
    if low > 0:
        return f"Supported by the data: {detail}."
    return f"The data does not support a gain yet: {detail}."
