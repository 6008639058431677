from __future__ import annotations

import logging
import pickle
from dataclasses import replace

import optuna
import pytest
import sqlalchemy
from optuna.samplers import PartialFixedSampler
from optuna.trial import TrialState

from rankadaptor_optuna import RankAdaptorSampler, RankSpace, recommend
from rankadaptor_optuna.database.attributes import PRIOR_ATTR
from rankadaptor_optuna.database.connections import UnreachableError
from rankadaptor_optuna.priors.choice import PriorChoice, uses
from rankadaptor_optuna.priors.store import PriorStore, Use, Version
from rankadaptor_optuna.surrogate.prior import load_prior

SPACE = RankSpace(6, (2, 4, 8), "uniform:4")
SHIPPED = load_prior("pretrained")
OTHER = replace(SHIPPED, mean=-SHIPPED.mean)


@pytest.fixture
def url(tmp_path):
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    PriorStore(url).add("mine", OTHER)
    return url


def run(storage, prior, n_trials=1, name="s", seed=0, **settings):
    """A worker that makes or resumes a study."""
    sampler = RankAdaptorSampler(SPACE, prior=prior, seed=seed, **settings)
    study = optuna.create_study(
        storage=storage, study_name=name, sampler=sampler, direction="maximize", load_if_exists=True
    )
    study.optimize(lambda trial: sum(i * r for i, r in SPACE.suggest(trial).items()), n_trials=n_trials)
    return study


def identity(study):
    return study.user_attrs[PRIOR_ATTR]


def configurations(study):
    return [t.params for t in study.trials]


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("optuna"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        (None, "none"),
        ("pretrained", f"pretrained:{SHIPPED.checksum}"),
        (OTHER, f"custom:{OTHER.checksum}"),
        ("db:mine", "db:mine@1"),
        ("db:mine@1", "db:mine@1"),
    ],
)
def test_the_priors_identity_is_stored_with_the_study(url, given, stored):
    assert identity(run(url, given)) == stored


def test_a_prior_of_a_file_has_the_identity_of_its_weights(url, tmp_path):
    OTHER.save(tmp_path / "p.safetensors")
    assert identity(run(url, tmp_path / "p.safetensors")) == f"custom:{OTHER.checksum}"


def test_proposals_do_not_depend_on_where_the_priors_weights_are_stored(url):
    stored, given, shipped = (
        run(url, prior, 6, name) for prior, name in (("db:mine", "a"), (OTHER, "b"), ("pretrained", "c"))
    )
    assert configurations(stored) == configurations(given) != configurations(shipped)


def test_a_resumed_study_keeps_the_version_it_began_with(url, warnings):
    run(url, "db:mine", 3)
    whole = run(url, "db:mine", 6, "whole")
    PriorStore(url).add("mine", SHIPPED)
    resumed = run(url, "db:mine", 3)
    assert identity(resumed) == "db:mine@1"
    assert configurations(resumed) == configurations(whole)
    assert identity(run(url, "db:mine", name="new")) == "db:mine@2"
    assert not warnings.records


@pytest.mark.parametrize(("given", "is_told"), [("pretrained", False), (None, True), ("db:mine@2", True)])
def test_a_worker_that_was_given_another_prior_follows_the_study(url, warnings, given, is_told):
    run(url, "db:mine", 3)
    whole = run(url, "db:mine", 6, "whole")
    PriorStore(url).add("mine", SHIPPED)
    resumed = run(url, given, 3)
    assert identity(resumed) == "db:mine@1"
    assert configurations(resumed) == configurations(whole)
    told = [r for r in warnings.records if "study 's' began with the prior db:mine@1" in r.getMessage()]
    assert len(told) == is_told  # once, not at each trial


def test_the_prior_written_last_counts_for_workers_that_begin_together(url):
    study = run(url, "db:mine", 2)
    study.set_user_attr(PRIOR_ATTR, "none")  # as if another had written at the same moment
    study.optimize(lambda trial: sum(i * r for i, r in SPACE.suggest(trial).items()), n_trials=4)
    as_it_goes_on = run(None, None, 0)
    for trial in study.trials[:2]:
        as_it_goes_on.add_trial(trial)
    as_it_goes_on.optimize(lambda trial: sum(i * r for i, r in SPACE.suggest(trial).items()), n_trials=4)
    assert configurations(study) == configurations(as_it_goes_on)


def test_recommend_uses_the_studys_prior_whatever_it_is_given(url):
    study = run(url, "db:mine", 4)
    expected = recommend(study)
    opened = optuna.load_study(study_name="s", storage=url)
    for prior in ("pretrained", None, PriorChoice("db:mine@1")):
        found = recommend(opened, prior=prior)
        assert (found.ranks, found.predicted, found.std) == (expected.ranks, expected.predicted, expected.std)
    copied = optuna.create_study(direction="maximize")
    copied.add_trials(study.trials)
    assert recommend(copied, space=SPACE).predicted != expected.predicted
    assert recommend(copied, space=SPACE, prior=OTHER).predicted == expected.predicted
    assert PRIOR_ATTR not in copied.user_attrs  # who only reads leaves no trace


@pytest.mark.parametrize("storage", ["memory", "journal", "grpc"], indirect=True)
def test_a_storage_that_is_no_database_needs_the_url_of_one(url, storage):
    with pytest.raises(ValueError, match="study 't' is in no database that could hold priors; name one: prior_"):
        run(storage, "db:mine", name="t")
    study = run(storage, "db:mine", 4, prior_storage=url)
    assert identity(study) == "db:mine@1"
    assert recommend(study).predicted == recommend(run(None, OTHER, 4)).predicted
    opened = optuna.load_study(study_name="s", storage=storage)
    assert recommend(opened, prior=PriorChoice(storage=url)).predicted == recommend(study).predicted
    assert PriorStore(url).versions()[0].studies == ("s",)
    assert PriorStore(url).collect([]) == ([], [])  # who could tell whether the study is gone?


def break_weights(url):
    engine = sqlalchemy.create_engine(url)
    with engine.begin() as connection:
        connection.execute(sqlalchemy.text("UPDATE rankadaptor_priors SET weights = :w"), {"w": b"broken"})
    engine.dispose()


def test_a_bad_prior_stops_a_study_by_name_and_leaves_no_trial_running(url):
    with pytest.raises(ValueError, match="there is no prior db:nothing in"):
        run(url, "db:nothing")
    run(url, "db:mine", name="t")
    break_weights(url)
    with pytest.raises(ValueError, match=r"db:mine@1 in .* is corrupt"):
        run(url, "db:mine", name="t")
    for name, states in (("s", [TrialState.FAIL]), ("t", [TrialState.COMPLETE, TrialState.FAIL])):
        study = optuna.load_study(study_name=name, storage=url)
        assert [t.state for t in study.trials] == states
    with pytest.raises(ValueError, match=r"db:mine@1 in .* is corrupt"):
        recommend(optuna.load_study(study_name="t", storage=url))


def test_on_bad_prior_replaces_it_with_the_shipped_prior_for_this_worker_alone(url, warnings):
    run(url, "db:mine", 2)
    break_weights(url)
    study = run(url, "db:mine", 2, on_bad_prior="pretrained")
    assert identity(study) == "db:mine@1"
    assert "is corrupt" in warnings.records[0].getMessage()
    assert "Going on with the shipped prior." in warnings.records[0].getMessage()
    with pytest.raises(ValueError, match="is corrupt"):
        run(url, "db:mine")
    for given in ("nowhere", "db:gone"):
        study = run(url, given, 2, f"new with {given}", on_bad_prior="pretrained")
        assert [t.state for t in study.trials] == [TrialState.COMPLETE] * 2
        assert PRIOR_ATTR not in study.user_attrs


def test_a_database_of_priors_that_cannot_be_reached_is_no_bad_prior(url):
    away = "sqlite:////no/such/folder/priors.db"
    with pytest.raises(UnreachableError, match="cannot be reached"):
        run(None, "db:mine", prior_storage=away, on_bad_prior="pretrained")


@pytest.mark.parametrize("stored", [7, [], {}, "db:", "db:mine", "db:mine@x", "db:mine@1\x1b[31m"])
def test_an_identity_that_names_no_prior_is_refused_in_one_line(url, stored):
    study = run(url, "db:mine", 1)
    study.set_user_attr(PRIOR_ATTR, stored)
    with pytest.raises(ValueError, match="prior") as caught:
        run(url, "db:mine@1", 1)
    assert "\x1b" not in str(caught.value)
    assert uses(study._storage) == []


def test_a_prior_that_a_worker_cannot_read_is_explained(url, monkeypatch, warnings):
    study = run(url, OTHER, 2)
    with pytest.raises(ValueError, match=f"began with a prior of its own, of checksum {OTHER.checksum}: give that"):
        run(url, "pretrained")
    assert recommend(optuna.load_study(study_name="s", storage=url), prior=OTHER).evidence.n_trials == 2
    study.set_user_attr(PRIOR_ATTR, "web:1")
    with pytest.raises(ValueError, match="has the prior 'web:1', which this version does not know"):
        run(url, "pretrained")
    study.set_user_attr(PRIOR_ATTR, "pretrained:0123")  # shipped with another version of the package
    assert len(run(url, "pretrained", 2).trials) == 6
    assert "began with the shipped prior of another version (0123)" in warnings.records[0].getMessage()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"prior": "db:"}, "expected a prior like db:NAME"),
        ({"prior": "db:mine@0"}, "expected a prior like db:NAME"),
        ({"on_bad_prior": "ignore"}, 'on_bad_prior must be "raise" or "pretrained"'),
    ],
)
def test_an_invalid_prior_is_refused_by_the_constructor(settings, says):
    with pytest.raises(ValueError, match=says):
        RankAdaptorSampler(**settings)


def test_one_sampler_serves_studies_of_different_priors(url):
    sampler = RankAdaptorSampler(SPACE, seed=0)
    studies = [
        optuna.create_study(storage=url, study_name=name, sampler=sampler, direction="maximize") for name in "ab"
    ]
    studies[0].set_user_attr(PRIOR_ATTR, "db:mine@1")
    for _ in range(5):
        for study in studies:
            study.optimize(lambda trial: sum(i * r for i, r in SPACE.suggest(trial).items()), n_trials=1)
    assert configurations(studies[0]) == configurations(run(None, OTHER, 5))
    assert configurations(studies[1]) == configurations(run(None, "pretrained", 5))
    again = pickle.loads(pickle.dumps(sampler))
    assert again.prior.find(studies[0]).checksum == OTHER.checksum


def test_a_sampler_inside_another_finds_the_prior_too(url):
    inside = RankAdaptorSampler(SPACE, prior="db:mine", seed=0)
    study = optuna.create_study(storage=url, sampler=PartialFixedSampler({}, inside), direction="maximize")
    study.optimize(lambda trial: sum(i * r for i, r in SPACE.suggest(trial).items()), n_trials=3)
    assert identity(study) == "db:mine@1"


def test_uses_are_known_from_the_studies_and_forgotten_with_them(url):
    store = PriorStore(url)
    run(url, "db:mine", name="kept")
    run(url, "db:mine", name="gone")
    run(url, None, name="plain")
    storage = optuna.storages.RDBStorage(url)
    first = Version("mine", 1)
    assert (
        sorted(uses(storage))
        == [Use("gone", first), Use("kept", first)]
        == sorted(Use(study, first) for study in store.versions()[0].studies)
    )
    optuna.delete_study(study_name="gone", storage=storage)
    store.add("mine", SHIPPED)
    assert store.collect(uses(storage)) == ([Use("gone", first)], [])
    optuna.delete_study(study_name="kept", storage=storage)
    assert store.collect(uses(storage)) == ([Use("kept", first)], [first])
