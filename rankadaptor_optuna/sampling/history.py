"""The trials of a study's search: each read from the storage once, in any process the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from optuna.distributions import BaseDistribution
from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.database.attributes import sensitivity_of
from rankadaptor_optuna.sampling.encoding import Encoding
from rankadaptor_optuna.sampling.observations import EncodedTrials
from rankadaptor_optuna.sampling.rank_parameters import Templates, rank_parameters
from rankadaptor_optuna.sampling.trials import retried_numbers, verification_seed
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.surrogate.bayesian import BayesianModel

_MIN_RECENT = 10  # trials whose parameters make the search space, at least; set by hand


class History:
    """The trials of a search, without verification trials; a cache that any process can rebuild from the storage.

    Verification trials use other seeds: their scores have another offset, and the search may still try their ranks.

    Attributes:
        finished: Finished trials in the order of reading.
        unfinished: Waiting and running trials at the last reading.
        sensitivity: Sensitivity of the loss to each layer's adapter, by rank parameter; empty where unknown.
        interrupted: Numbers of trials that were run again, as their worker was killed: not their own failures.
    """

    def __init__(self, study: Study) -> None:
        self._storage, self._study_id = study._storage, study._study_id
        self._reset()

    def _reset(self) -> None:
        self.finished: list[FrozenTrial] = []
        self.unfinished: list[FrozenTrial] = []
        self.sensitivity: dict[str, float] = {}
        self.interrupted: set[int] = set()
        self._n_read = 0
        self._spaces: dict[tuple[RankSpace | None, Templates | None], dict[str, BaseDistribution]] = {}  # as of now
        self._distributions: dict[str, tuple[int, BaseDistribution]] = {}  # the latest, with its trial's number
        self._params: dict[TrialState, list[tuple[int, frozenset[str], dict[str, Any]]]] = {s: [] for s in TrialState}
        self._encoded: EncodedTrials | None = None
        directions = self._storage.get_study_directions(self._study_id)
        self._signs = [1.0 if each is StudyDirection.MAXIMIZE else -1.0 for each in directions]

    def is_of(self, study: Study) -> bool:
        """Returns whether this is the history of ``study``."""
        return study._storage is self._storage and study._study_id == self._study_id

    def refresh(self) -> None:
        """Reads the trials that started or finished since the last reading.

        They come from the storage, as under Optuna's Hyperband a study object shows the trials of one bracket only.
        """
        self.read(self._storage.get_all_trials(self._study_id, deepcopy=False))

    def read(self, trials: Sequence[FrozenTrial]) -> None:
        """Reads those of all the study's ``trials`` that started or finished since the last reading."""
        if len(trials) < self._n_read or (self.finished and not _is_same(self.finished[-1], trials)):
            self._reset()  # the study was deleted, and another study got its id
        if not self.sensitivity:
            self.sensitivity = sensitivity_of(self._storage.get_study_user_attrs(self._study_id))
        unread = [*(trials[t.number] for t in self.unfinished), *trials[self._n_read :]]
        unread = [t for t in unread if verification_seed(t) is None]
        self._n_read = len(trials)
        self.unfinished = [t for t in unread if not t.state.is_finished()]
        for trial in unread:
            self.interrupted |= retried_numbers(trial)
            if trial.state.is_finished():
                self.finished.append(trial)
                self._read_parameters(trial)

    def _read_parameters(self, trial: FrozenTrial) -> None:
        self._spaces.clear()
        self._params[trial.state].append((trial.number, frozenset(trial.params), trial.params))
        for name, distribution in trial.distributions.items():
            if trial.number >= self._distributions.get(name, (0, None))[0]:
                self._distributions[name] = trial.number, distribution

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """The latest distribution of each parameter of the finished trials."""
        return {name: distribution for name, (_, distribution) in self._distributions.items()}

    @property
    def names(self) -> set[str]:
        """Names of the parameters of all finished trials that have more than one value."""
        return {name for name, distribution in self.distributions.items() if not distribution.single()}

    def search_space(self, space: RankSpace | None, declared: Templates | None) -> dict[str, BaseDistribution]:
        """Returns the parameters to model together: the ranks of recent trials, and other parameters of these trials.

        Recent is the latest half of the trials, at least 10. The ranks are those that most of them have; beside them
        stand the parameters that all recent trials with these ranks have, but for those that decide whether a trial has
        these ranks (see ``_decides``). So a stray trial, a conditional space, or a space that changed costs the ranks
        nothing. Trials are the completed and pruned ones; failed ones, whose parameters may be incomplete, where there
        are no others.

        Args:
            space: The rank space, whose parameters are always searched; None without one.
            declared: Templates of the rank parameters' names, see ``rank_parameters``.

        Returns:
            Their latest distributions (ranges may change), sorted by name, as storages differ in their order; of a
            single value where they are ranks only; empty without a space where no trial has ranks.
        """
        if (space, declared) not in self._spaces:
            self._spaces[space, declared] = self._search_space(space, declared)
        return dict(self._spaces[space, declared])

    def _search_space(self, space: RankSpace | None, declared: Templates | None) -> dict[str, BaseDistribution]:
        given = {} if space is None else space.distributions()

        def ranks_among(names: frozenset[str]) -> frozenset[str]:
            if space is not None:
                return frozenset(names & given.keys())
            return frozenset(rank_parameters({name: latest[name] for name in names}, declared))

        complete = self._params[TrialState.COMPLETE] + self._params[TrialState.PRUNED]
        trials = sorted(complete or self._params[TrialState.FAIL], key=lambda trial: trial[0])
        recent = trials[-max(_MIN_RECENT, len(trials) // 2) :]
        latest = self.distributions
        counts = Counter[frozenset[str]]()
        for names, n in Counter(names for _, names, _ in recent).items():
            counts[ranks_among(names)] += n
        del counts[frozenset()]
        if not counts:
            return given
        chosen = max(reversed(counts), key=lambda ranks: counts[ranks])  # of equals, the last to appear
        having = [(names, params) for _, names, params in recent if chosen <= names]
        others = [params for _, names, params in recent if not chosen <= names]
        bound = frozenset.intersection(*(names for names, _ in having)) - chosen
        if others:
            bound = bound - {name for name in bound if _decides(name, [params for _, params in having], others)}
        several = {name for name in bound if not latest[name].single()}
        return {name: latest[name] for name in sorted(chosen | several)} | given

    def encoded(self, encoding: Encoding, new_model: Callable[[Encoding], BayesianModel]) -> EncodedTrials:
        """Returns the finished trials encoded for a search space.

        Args:
            encoding: The search space; while it stays the same, each trial is encoded once.
            new_model: Makes the model that encodes the trials, where the search space is another than before.
        """
        if self._encoded is None or not self._encoded.encoding.is_like(encoding):
            self._encoded = EncodedTrials(encoding, new_model(encoding), self._signs)
        self._encoded.add(self.finished, self.interrupted)
        return self._encoded


def _decides(name: str, having: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> bool:
    """Returns whether a parameter seems to decide whether a trial has the ranks, given trials that have and lack them.

    It does where trials without the ranks have a category that trials with them never have, or numbers
    apart from theirs.
    """
    with_ranks = [params[name] for params in having]
    without = [params[name] for params in others if name in params]
    if not without:
        return False
    values = [*with_ranks, *without]
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return min(without) > max(with_ranks) or max(without) < min(with_ranks)
    return any(value not in with_ranks for value in without)


def _is_same(known: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    now = trials[known.number] if known.number < len(trials) else None
    return now is not None and (now._trial_id, now.datetime_start) == (known._trial_id, known.datetime_start)
