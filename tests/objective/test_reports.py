from __future__ import annotations

import optuna
import pytest
from optuna.trial import TrialState

from rankadaptor_optuna import RankAdaptorSampler, create_study
from rankadaptor_optuna.database.attributes import VERIFY_ATTR
from rankadaptor_optuna.recovery.data import token_blocks
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.studies.fitted import FittedStudy
from rankadaptor_optuna.studies.reading import StudyReading
from tests.objective.common import fixed, run


def test_reports_are_the_loss_on_the_first_held_out_blocks_at_each_interval(make_job, tokenizer, model, texts):
    job = make_job(tokenizer, report_every=1, report_blocks=2)
    trial = run(job, 1).trials[0]
    assert list(trial.intermediate_values) == [1, 2]  # the last step's is the score
    first = token_blocks(tokenizer, texts[8:], 32)[:2]
    with job.recovered(dict.fromkeys(range(4), 4)) as adapted:
        final = block_losses(adapted, first).mean()
    assert trial.intermediate_values[2] == pytest.approx(final, abs=0.3)
    assert trial.intermediate_values[1] > trial.intermediate_values[2]
    plain = run(make_job(tokenizer), 1).trials[0]
    assert trial.value == plain.value
    assert not plain.intermediate_values


def test_a_pruner_stops_a_trial_which_leaves_the_model_as_it_was(make_job, tokenizer, model):
    job = make_job(tokenizer, report_every=1)
    study = create_study(direction="minimize", sampler=RankAdaptorSampler(job.space, prior=None, seed=0))
    study.pruner = optuna.pruners.ThresholdPruner(upper=0.0)
    study.optimize(job, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.PRUNED] * 2
    assert [list(t.intermediate_values) for t in study.trials] == [[1]] * 2
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_trial_that_verifies_is_never_pruned(make_job, tokenizer):
    job = make_job(tokenizer, report_every=1)
    study = create_study(direction="minimize", sampler=RankAdaptorSampler(job.space, prior=None, seed=0))
    study.pruner = optuna.pruners.ThresholdPruner(upper=0.0)
    study.enqueue_trial({name: 4 for name in job.space.distributions()}, user_attrs={VERIFY_ATTR: 5})
    study.optimize(job, n_trials=1)
    assert study.trials[0].state is TrialState.COMPLETE


def by_items(job, n_trials, pruner):
    sampler = RankAdaptorSampler(job.space, prior=None, seed=0)
    study = create_study(direction="minimize", sampler=sampler, pruner=pruner)
    study.optimize(job, n_trials=n_trials)
    return study


class Stops(optuna.pruners.BasePruner):
    """Says stop to every trial but the first three, as soon as it has two batches of reports."""

    def prune(self, study, trial):
        return trial.number >= 3 and len(trial.intermediate_values) >= 8


def test_items_are_the_held_out_blocks_whose_mean_is_the_score(make_job, tokenizer, texts):
    job = make_job(tokenizer, report_items=True)
    first, second = by_items(job, 2, optuna.pruners.NopPruner()).trials
    with job.recovered(dict.fromkeys(range(4), 4)) as adapted:
        losses = block_losses(adapted, token_blocks(tokenizer, texts[8:], 32, limit=12))
    assert [first.intermediate_values[i] for i in range(12)] == pytest.approx(losses, abs=1e-5)
    assert first.value == pytest.approx(losses.mean(), abs=1e-5)
    assert list(second.intermediate_values) != list(first.intermediate_values)  # in another order
    assert first.value == pytest.approx(run(make_job(tokenizer), 1).trials[0].value, abs=1e-6)


def test_an_evaluation_that_is_stopped_is_no_score_but_informs_the_model(make_job, tokenizer):
    job = make_job(tokenizer, report_items=True)
    study = by_items(job, 5, Stops())
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3 + [TrialState.PRUNED] * 2
    assert [len(t.intermediate_values) for t in study.trials] == [12] * 3 + [8] * 2
    assert not any("lora" in name for name, _ in job.model.named_parameters())
    data = FittedStudy(StudyReading(study, job.space), None).observations
    assert [t.number for t in data.trials] == [0, 1, 2, 3, 4]
    assert (data.variance > 0).tolist() == [False] * 3 + [True] * 2
    scores = [job(fixed(job, *trial.params.values())) for trial in study.trials[3:]]
    assert data.values[3:, 0] == pytest.approx(scores, abs=0.2)


def test_wilcoxons_pruner_stops_evaluating_ranks_that_are_clearly_worse(make_job, tokenizer):
    job = make_job(tokenizer, candidates=(0, 4), report_items=True)
    study = create_study(
        direction="minimize", sampler=RankAdaptorSampler(job.space, prior=None), pruner=optuna.pruners.WilcoxonPruner()
    )
    for rank in (4, 0):  # the second one recovers nothing
        study.enqueue_trial(dict.fromkeys(job.space.distributions(), rank))
    study.optimize(job, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE, TrialState.PRUNED]
    assert len(study.trials[1].intermediate_values) == 4


def test_a_trial_that_verifies_reports_no_items(make_job, tokenizer):
    job = make_job(tokenizer, report_items=True)
    study = create_study(direction="minimize", sampler=RankAdaptorSampler(job.space, prior=None, seed=0))
    study.enqueue_trial({name: 4 for name in job.space.distributions()}, user_attrs={VERIFY_ATTR: 5})
    study.optimize(job, n_trials=1)
    assert (study.trials[0].state, study.trials[0].intermediate_values) == (TrialState.COMPLETE, {})
