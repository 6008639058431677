from __future__ import annotations

import math
import weakref

import optuna
import pytest
import torch
from optuna.trial import TrialState

import rankadaptor_optuna.objective
from rankadaptor_optuna import RankAdaptorSampler, RankSpace, RecoveryObjective, create_study
from rankadaptor_optuna.database.attributes import SENSITIVITY_ATTR, VERIFY_ATTR
from rankadaptor_optuna.recovery.data import Examples, instruction_examples, token_blocks
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.lora import attached, lora_config
from rankadaptor_optuna.recovery.sensitivity import sensitivities
from rankadaptor_optuna.recovery.tasks import TaskSuite
from rankadaptor_optuna.recovery.train import TrainingConfig, train
from tests.objective.common import TRAINING, fixed, run


def test_the_score_is_that_of_a_recovery_by_hand(job, model, tokenizer, texts):
    trial = fixed(job, 2, 8, 4, 2)
    score = job(trial)
    with attached(model, lora_config({0: 2, 1: 8, 2: 4, 3: 2}), seed=0) as adapted:
        train(adapted, token_blocks(tokenizer, texts[:8], 32), TRAINING, seed=0)
        expected = block_losses(adapted, token_blocks(tokenizer, texts[8:], 32, limit=12)).mean()
    assert score == pytest.approx(expected, abs=1e-6)
    assert trial.user_attrs["trainable_parameters"] == job.space.cost({0: 2, 1: 8, 2: 4, 3: 2})
    assert trial.user_attrs["seconds"] > 0
    assert "fail_reason" not in trial.user_attrs


def test_scores_differ_by_ranks_and_repeat_for_the_same(job):
    scores = [job(fixed(job, *ranks)) for ranks in ((2, 4, 8, 2), (8, 4, 2, 2), (2, 4, 8, 2))]
    assert scores[0] == scores[2] != scores[1]


def test_recovery_helps_and_leaves_the_model_as_it_was(job, model, tokenizer, texts):
    blocks = token_blocks(tokenizer, texts[8:], 32)
    before = block_losses(model, blocks)
    assert job(fixed(job, 4, 4, 4, 4)) < before.mean() - 0.3
    assert (block_losses(model, blocks) == before).all()


def test_each_seed_is_another_recovery_and_a_verification_trial_takes_its_own(job, make_job, tokenizer, texts):
    trial, blocks, losses = fixed(job, 4, 4, 4, 4), token_blocks(tokenizer, texts[8:], 32), []
    trial.set_user_attr(VERIFY_ATTR, 5)
    assert job(trial) == make_job(tokenizer, seed=5)(fixed(job, 4, 4, 4, 4)) != job(fixed(job, 4, 4, 4, 4))
    for seed in (None, 0, 5):
        with job.recovered(dict.fromkeys(range(4), 4), seed=seed) as adapted:
            losses.append(block_losses(adapted, blocks).mean())
    assert losses[0] == losses[1] != losses[2]


def test_fixed_layers_are_recovered_too(model, tokenizer, texts):
    cost = RankSpace.from_model(model).costs[0]
    space = RankSpace(4, layers=[1, 2], costs=[cost, cost], fixed_ranks={0: 6}, fixed_cost=6 * cost)
    job = RecoveryObjective(model, tokenizer, space, train=texts, validation=texts, training=TRAINING, block_length=32)
    with job.recovered({1: 2, 2: 4}) as adapted:
        ranks = {n.split(".")[4]: m.r["default"] for n, m in adapted.named_modules() if getattr(m, "lora_A", None)}
    assert ranks == {"0": 6, "1": 2, "2": 4}


def test_attention_and_mlp_are_recovered_with_ranks_of_their_own(model, tokenizer, texts):
    space = RankSpace.from_model(model, (0, 4, 8), "uniform:4", granularity="sublayer")
    job = RecoveryObjective(
        model, tokenizer, space, train=texts[:8], validation=texts[8:], training=TRAINING, block_length=32
    )
    study = run(job, 3)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 3
    assert set(study.trials[0].params.values()) == {4}
    scores = [job(fixed(job, *ranks)) for ranks in ((0, 8) * 4, (8, 0) * 4, (0, 8) * 4)]
    assert scores[0] == scores[2] != scores[1]
    with job.recovered(space.uniform() | {"2.mlp": 0, "1.self_attn": 8}) as adapted:
        ranks = {}
        for name, module in adapted.named_modules():
            if getattr(module, "lora_A", None):
                ranks[".".join(name.split(".")[4:6])] = module.r["default"]
    assert ranks == {m: r for m, r in (space.uniform() | {"2.mlp": 0, "1.self_attn": 8}).items() if r}


def test_tasks_are_attributes_of_a_trial_and_the_metric_is_its_score(make_job, tokenizer, local_task):
    suite = TaskSuite(tokenizer, {"facts": 2.0}, part="search", include_path=str(local_task))
    values = {}
    for metric in ("loss", "margin", "accuracy"):
        job = make_job(tokenizer, tasks=suite, metric=metric)
        trial = fixed(job, 2, 8, 4, 2)
        values[metric] = job(trial)
        attributes = trial.user_attrs
        assert job.direction == ("minimize" if metric == "loss" else "maximize")
        assert attributes[metric] == values[metric]
    assert len(set(values.values())) == 3
    with job.recovered({0: 2, 1: 8, 2: 4, 3: 2}) as adapted:
        (score,) = suite.evaluate(adapted)
    assert attributes["facts:accuracy"] == attributes["accuracy"] == score.accuracy
    assert attributes["facts:margin"] == attributes["margin"] == pytest.approx(score.margin)
    assert make_job(tokenizer)(fixed(job, 2, 8, 4, 2)) == values["loss"]


def test_a_study_of_another_direction_is_refused_at_the_first_trial(job):
    for directions in (["maximize"], ["minimize", "minimize"]):
        study = optuna.create_study(directions=directions)
        with pytest.raises(ValueError, match="the loss to minimize: create the study with"):
            study.optimize(job, n_trials=1)


def test_where_higher_is_better_reports_are_too(make_job, tokenizer, local_task):
    suite = TaskSuite(tokenizer, ["facts"], include_path=str(local_task))
    job = make_job(tokenizer, tasks=suite, metric="margin", report_every=1)
    study = create_study(direction=job.direction, sampler=RankAdaptorSampler(job.space, prior=None, seed=0))
    study.optimize(job, n_trials=1)
    reports = study.trials[0].intermediate_values
    assert reports[2] > reports[1]
    assert reports[2] == pytest.approx(-study.trials[0].user_attrs["loss"], abs=0.5)


def test_a_study_of_recoveries_reports_each_step(make_job, tokenizer):
    steps = []
    job = make_job(tokenizer, on_step=lambda step, loss: steps.append(step))
    study = run(job, 2)
    assert steps == [0, 1, 2] * 2
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2
    assert all(t.user_attrs["trainable_parameters"] <= job.space.budget for t in study.trials)


@pytest.mark.parametrize("error", [MemoryError("no room"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_trial_that_runs_out_of_memory_fails_with_its_reason_and_the_next_one_runs(job, model, monkeypatch, error):
    def first_fails(adapted, *args, **kwargs):
        if not failed:
            failed.append(adapted)
            raise error
        return train(adapted, *args, **kwargs)

    failed = []
    monkeypatch.setattr(rankadaptor_optuna.objective, "train", first_fails)
    study = run(job, 2)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.trials[0].user_attrs["fail_reason"] == f"{type(error).__name__}: {error}"
    assert not any("lora" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("error", "micro"),
    [(OSError("disk gone"), None), (RuntimeError("DataLoader worker (pid 7) is killed by signal"), 1)],
)
def test_a_trial_whose_data_fails_midway_is_freed_and_the_next_one_runs(
    make_job, tokenizer, model, monkeypatch, error, micro
):
    """The second step's batch cannot be read, when adapter, gradients and optimiser state are all there."""
    job = make_job(
        tokenizer, training=TrainingConfig(steps=3, batch_size=2, learning_rate=0.05, micro_batch_size=micro)
    )
    expected, held, calls, real = run(job, 1).trials[0].value, [], [], Examples.batch

    def batch(self, rows):
        calls.append(rows)
        if len(calls) == (3 if micro else 2):
            held.extend(weakref.ref(p) for p in model.parameters() if p.requires_grad)
            held.extend(weakref.ref(p.grad) for p in model.parameters() if p.grad is not None)
            raise type(error)(*error.args)  # one of its own: an error keeps the frames that it went through
        return real(self, rows)

    monkeypatch.setattr(Examples, "batch", batch)
    study = run(job, 2)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.trials[0].user_attrs["fail_reason"] == f"{type(error).__name__}: {error}"
    assert len(held) >= 2 * 4 * 7
    assert not [ref for ref in held if ref() is not None]
    assert not any(p.grad is not None for p in model.parameters())
    monkeypatch.undo()
    assert run(job, 1).trials[0].value == expected


def test_a_score_that_is_not_finite_fails_with_its_reason_and_the_next_trial_runs(job, monkeypatch):
    scores, real = [], rankadaptor_optuna.objective.block_losses
    monkeypatch.setattr(
        rankadaptor_optuna.objective,
        "block_losses",
        lambda *args: scores.append(0) or real(*args) * (float("nan") if len(scores) == 1 else 1),
    )
    study = run(job, 2)
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]
    assert study.trials[0].user_attrs["fail_reason"] == "FloatingPointError: the loss on held-out data is nan."


def test_a_diverged_trial_fails_with_the_step_and_its_traceback_is_logged(make_job, tokenizer, caplog):
    job = make_job(tokenizer, training=TrainingConfig(steps=4, learning_rate=1e30))
    study = run(job, 1)
    assert study.trials[0].state is TrialState.FAIL
    assert study.trials[0].user_attrs["fail_reason"].startswith("FloatingPointError: training loss is nan at step")
    assert "Trial 0 failed.\nTraceback (most recent call last):" in caplog.text
    assert "FloatingPointError: training loss is nan" in caplog.text


@pytest.mark.parametrize("error", [RuntimeError("a bug"), OSError("no such file"), KeyError("key")])
def test_an_error_of_the_users_callback_or_pruner_ends_the_study(make_job, tokenizer, error):
    def fails(*_):
        raise error

    pruner = optuna.pruners.NopPruner()
    pruner.prune = fails
    for job in (
        make_job(tokenizer, on_step=fails),
        make_job(tokenizer, report_every=1),
        make_job(tokenizer, report_items=True),
    ):
        study = create_study(direction="minimize", sampler=RankAdaptorSampler(job.space, prior=None), pruner=pruner)
        with pytest.raises(type(error)) as raised:
            study.optimize(job, n_trials=2)
        assert raised.value is error
        assert len(study.trials) == 1
        assert not any("lora" in name for name, _ in job.model.named_parameters())


def test_a_mistake_in_the_program_is_not_hidden_as_a_failed_trial(job, monkeypatch):
    monkeypatch.setattr(rankadaptor_optuna.objective, "block_losses", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(job, 1)


def test_a_finished_trial_says_how_fast_it_trained_and_how_much_memory_its_process_held(job):
    pytest.importorskip("resource")
    attributes = run(job, 1).trials[0].user_attrs
    assert attributes["tokens_per_second"] > 0
    assert attributes["peak_rss_mib"] > 10
    assert attributes["tokens_per_second"] >= 3 * 2 * 32 / attributes["seconds"] * 0.9


def test_the_study_stores_the_score_without_recovery_once(make_job, tokenizer, local_task):
    tasks = TaskSuite(tokenizer, ("facts",), part="search", limit=6, include_path=str(local_task))
    for settings in ({}, {"tasks": tasks, "metric": "margin"}):
        job = make_job(tokenizer, **settings)
        study = create_study(direction=job.direction, sampler=RankAdaptorSampler(job.space, prior=None, seed=0))
        study.optimize(job, n_trials=1)
        stored = study.user_attrs["rankadaptor:unrecovered"]
        if settings:
            assert stored == pytest.approx(tasks.weighted(tasks.evaluate(job.model), "margin"))
        else:
            assert stored == pytest.approx(block_losses(job.model, job.held_out).mean())
        study.set_user_attr("rankadaptor:unrecovered", 7.0)
        study.optimize(job, n_trials=1)
        assert study.user_attrs["rankadaptor:unrecovered"] == 7.0


RECORDS = [{"instruction": f"Say {i}.", "input": "", "output": f"{i} is what I say."} for i in range(12)]


def test_records_are_recovered_on_and_scored_by_their_responses(make_job, tokenizer):
    settings = {"train": RECORDS[:8], "validation": RECORDS[8:], "block_length": 400}
    job = make_job(tokenizer, **settings)
    score = job(fixed(job, 4, 4, 4, 4))
    with job.recovered(dict.fromkeys(range(4), 4)) as adapted:
        examples = instruction_examples(tokenizer, RECORDS[8:], 400)
        assert score == pytest.approx(block_losses(adapted, examples).mean(), abs=1e-6)
    unmasked = make_job(tokenizer, mask_prompt=False, **settings)
    assert unmasked(fixed(unmasked, 4, 4, 4, 4)) != score


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "margin"}, "metric 'margin' needs tasks"),
        ({"metric": "accuracy"}, "metric 'accuracy' needs tasks"),
        ({"metric": "margin", "report_items": True}, "report_items needs metric 'loss', got 'margin'"),
        ({"block_length": 100_000}, "too few for one block of 100000"),
        ({"report_every": 0}, "report_every must be at least 1, got 0"),
        ({"report_every": 1, "report_items": True}, "give report_every or report_items, not both"),
        ({"report_blocks": 0}, "report_blocks must be at least 1, got 0"),
        ({"train": ["text", RECORDS[0]]}, "texts or records, not some of each"),
    ],
)
def test_settings_that_cannot_work_are_refused(make_job, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        make_job(tokenizer, **settings)


def test_the_uniform_trial_tells_the_study_once_how_sensitive_its_layers_are(job, monkeypatch):
    study = run(job, 3)
    with job.recovered(job.space.uniform()) as adapted:
        found = job.space.by_module(sensitivities(adapted, job.held_out))
    told = study.user_attrs[SENSITIVITY_ATTR]
    assert list(told) == list(job.space.distributions())
    assert list(told.values()) == pytest.approx(list(found.values()))
    assert max(told.values()) > 0
    monkeypatch.setattr("rankadaptor_optuna.studies.sensitivity_note.sensitivities", None)
    study.enqueue_trial({job.space.name(module): rank for module, rank in job.space.uniform().items()})
    study.optimize(job, n_trials=1)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 4


def test_no_other_trial_tells_of_sensitivity(job):
    study = optuna.create_study(direction="minimize")
    study.enqueue_trial(dict(zip(job.space.distributions(), (2, 8, 4, 2), strict=True)))
    uniform = {job.space.name(module): rank for module, rank in job.space.uniform().items()}
    study.enqueue_trial(uniform, user_attrs={VERIFY_ATTR: 5})  # of another seed
    study.optimize(job, n_trials=2)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2
    assert SENSITIVITY_ATTR not in study.user_attrs


def test_a_uniform_trial_without_adapters_is_the_pruned_model_and_has_no_sensitivity(make_job, tokenizer, model):
    job = make_job(tokenizer, candidates=(0, 8), budget="uniform:4")
    study = run(job, 1)
    assert study.trials[0].value == pytest.approx(block_losses(model, job.held_out).mean())
    assert set(study.trials[0].params.values()) == {0}
    assert SENSITIVITY_ATTR not in study.user_attrs


def test_attention_and_mlp_have_sensitivities_of_their_own(model, tokenizer, texts):
    space = RankSpace.from_model(model, (0, 4, 8), "uniform:4", granularity="sublayer")
    job = RecoveryObjective(
        model, tokenizer, space, train=texts[:8], validation=texts[8:], training=TRAINING, block_length=32
    )
    told = run(job, 1).user_attrs[SENSITIVITY_ATTR]
    assert list(told) == list(space.distributions())
    assert len(set(told.values())) == 8


def test_a_sensitivity_that_is_not_finite_is_not_told(job, monkeypatch):
    broken = {"model.layers.0.mlp.up_proj": math.nan}
    monkeypatch.setattr("rankadaptor_optuna.studies.sensitivity_note.sensitivities", lambda *_: broken)
    assert SENSITIVITY_ATTR not in run(job, 1).user_attrs


def test_threads_take_turns_on_the_model(job):
    alone = run(job, 4)
    shared = run(job, 4, n_jobs=2)
    assert [t.state for t in shared.trials] == [TrialState.COMPLETE] * 4
    assert {t.user_attrs["trainable_parameters"] for t in shared.trials} <= {job.space.cost(job.space.uniform())} | {
        job.space.cost(job.space.to_ranks(t.params)) for t in shared.trials
    }
    assert alone.trials[0].value in [t.value for t in shared.trials]
    assert not [name for name, _ in job.model.named_modules() if "lora" in name]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_study_without_gradients_around_it_trains_all_the_same(job, mode):
    expected = run(job, 1).trials[0].value
    with mode():
        assert run(job, 1).trials[0].value == expected


def test_a_model_without_weights_or_in_a_wrapper_is_refused_up_front(make_job, make_model, tokenizer, texts):
    with torch.device("meta"):
        empty = make_model()
    with torch.inference_mode():
        frozen = make_model()
    for model, message in ((empty, "not loaded"), (frozen, "inference_mode")):
        space = RankSpace.from_model(model, (2, 4, 8), "uniform:4")
        with pytest.raises(ValueError, match=message):
            RecoveryObjective(model, tokenizer, space, train=texts, validation=texts)
    with pytest.raises(ValueError, match=r"pass the model itself, model.module"):
        RankSpace.from_model(torch.nn.DataParallel(make_model()))
    with pytest.raises(ValueError, match=r"pass the model itself, model._orig_mod"):
        RankSpace.from_model(torch.compile(make_model()))


@pytest.mark.parametrize("seed", ["0", -1, True, 1.5])
def test_a_seed_is_an_integer(make_job, tokenizer, seed):
    with pytest.raises(ValueError, match="seed must be an integer of at least 0"):
        make_job(tokenizer, seed=seed)


def test_a_recovery_too_short_for_its_warm_up_or_its_reports_says_so(make_job, tokenizer):
    with pytest.warns(UserWarning, match="warms up in 100 steps, but there are 3"):
        make_job(tokenizer, training=TrainingConfig(steps=3, warmup=100))
    with pytest.warns(UserWarning, match="report_every=3 of 3 steps: no trial reports"):
        make_job(tokenizer, report_every=3)
