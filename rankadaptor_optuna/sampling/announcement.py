"""Announced ranks: how concurrent workers avoid trying the same rank configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from rankadaptor_optuna.database.attributes import PROPOSAL_ATTR
from rankadaptor_optuna.sampling.history import History
from rankadaptor_optuna.sampling.observations import EncodedTrials
from rankadaptor_optuna.sampling.trials import announced_ranks

# Tries to announce ranks that no other worker has announced meanwhile: with 4 processes on one database a second try
# is rare (tests/sampling); set by hand.
_MAX_TRIES = 10
RankTuple = tuple[int, ...]
IsSeen = Callable[[RankTuple], bool]


@dataclass
class Announcer:
    """Chooses the ranks of a running trial and announces them, so that concurrent workers choose other ranks.

    Optuna stores the parameters of a trial one by one, later. The announcement is one attribute, stored at once.

    Attributes:
        study: The study.
        trial: The running trial.
        history: Its search's trials.
        trials: The same trials, encoded.
    """

    study: Study
    trial: FrozenTrial
    history: History
    trials: EncodedTrials

    def choose(
        self, best_unseen: Callable[[Callable[[RankTuple], bool]], RankTuple], *, try_uniform: bool
    ) -> RankTuple:
        """Announces ranks that no other trial has, where there are such.

        Of two trials that announced the same ranks, the later trial chooses again, or both trials where each saw the
        other's announcement; the uniform configuration stays with the earlier trial.

        Args:
            best_unseen: Returns the best ranks for which a function returns False, or seen ones where all are seen.
            try_uniform: Whether to prefer the uniform configuration, unless another trial has it.

        Returns:
            The announced ranks, in the grid's order.
        """
        uniform = tuple(int(rank) for rank in self.trials.encoding.grid.reference)
        taken = {ranks for _, ranks in self._running()}
        try_uniform = try_uniform and self._lacks(uniform)

        def is_seen(ranks: RankTuple) -> bool:
            return ranks in taken or ranks in self.trials.tried

        for _ in range(_MAX_TRIES):
            ranks = uniform if try_uniform else best_unseen(is_seen)
            all_are_seen = is_seen(ranks)
            self._announce(ranks)
            rivals = {
                announced for number, announced in self._running() if number < self.trial.number or not try_uniform
            }
            if all_are_seen or not (ranks in rivals or ranks in self.trials.tried):
                break
            taken.add(ranks)
            try_uniform = False
        return ranks

    def _running(self) -> list[tuple[int, RankTuple | None]]:
        """Returns number and announced ranks of each other running trial, None before its announcement."""
        names = self.trials.encoding.rank_names
        return [
            (t.number, announced_ranks(t, names))
            for t in self.history.unfinished
            if t.state is TrialState.RUNNING and t.number != self.trial.number
        ]

    def _lacks(self, uniform: RankTuple) -> bool:
        """Returns whether the study has no uniform trial yet; a failed uniform trial is tried once more."""
        finished = self.trials.tried.get(uniform, [])
        running = self._running()
        is_running = any(ranks == uniform for _, ranks in running)
        may_become_uniform = any(ranks is None and number < self.trial.number for number, ranks in running)
        return finished in ([], [TrialState.FAIL]) and not is_running and not may_become_uniform

    def _announce(self, ranks: RankTuple) -> None:
        """Stores the announcement, then reads the trials again."""
        self.study._storage.set_trial_system_attr(self.trial._trial_id, PROPOSAL_ATTR, list(ranks))
        self.history.refresh()
        self.trials.add(self.history.finished, self.history.interrupted)
