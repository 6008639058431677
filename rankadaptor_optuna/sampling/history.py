"""The trials of a study's search: each read from the storage once, in any process the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from optuna.distributions import BaseDistribution
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.attributes import sensitivity_of
from rankadaptor_optuna.sampling.encoding import Encoding
from rankadaptor_optuna.sampling.observations import EncodedTrials
from rankadaptor_optuna.sampling.trials import verification_seed
from rankadaptor_optuna.surrogate.bayesian import BayesianModel


class History:
    """The trials of a search, without verification trials; a cache that any process can rebuild from the storage.

    Verification trials use other seeds: their scores have another offset, and the search may still try their ranks.

    Attributes:
        finished: Finished trials in the order of reading.
        unfinished: Waiting and running trials at the last reading.
        common: Parameters that every completed trial has, with their latest distributions (ranges may change).
        sensitivity: Sensitivity of the loss to each layer's adapter, by rank parameter; empty where unknown.
    """

    def __init__(self, study: Study) -> None:
        self._storage, self._study_id = study._storage, study._study_id
        self._reset()

    def _reset(self) -> None:
        self.finished: list[FrozenTrial] = []
        self.unfinished: list[FrozenTrial] = []
        self.common: dict[str, BaseDistribution] = {}
        self.sensitivity: dict[str, float] = {}
        self._latest_complete, self._n_read = -1, 0
        self._encoded: EncodedTrials | None = None
        self._n_objectives = len(self._storage.get_study_directions(self._study_id))

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
            if trial.state.is_finished():
                self.finished.append(trial)
            if trial.state is TrialState.COMPLETE:
                self._intersect(trial)

    def _intersect(self, trial: FrozenTrial) -> None:
        """Drops common parameters that a completed trial lacks; the latest trial's distributions replace earlier."""
        known = self.common if self._latest_complete >= 0 else trial.distributions
        newer = trial.distributions if trial.number > self._latest_complete else known
        self.common = {name: newer[name] for name in known if name in trial.distributions}
        self._latest_complete = max(self._latest_complete, trial.number)

    @property
    def searched(self) -> dict[str, BaseDistribution]:
        """The common parameters with more than one value, sorted by name, as storages differ in their order."""
        return {name: dist for name, dist in sorted(self.common.items()) if not dist.single()}

    def encoded(self, encoding: Encoding, new_model: Callable[[Encoding], BayesianModel]) -> EncodedTrials:
        """Returns the finished trials encoded for a search space.

        Args:
            encoding: The search space; while it stays the same, each trial is encoded once.
            new_model: Makes the model that encodes the trials, where the search space is another than before.
        """
        if self._encoded is None or not self._encoded.encoding.is_like(encoding):
            self._encoded = EncodedTrials(encoding, new_model(encoding), self._n_objectives)
        self._encoded.add(self.finished)
        return self._encoded


def _is_same(known: FrozenTrial, trials: Sequence[FrozenTrial]) -> bool:
    now = trials[known.number] if known.number < len(trials) else None
    return now is not None and (now._trial_id, now.datetime_start) == (known._trial_id, known.datetime_start)
