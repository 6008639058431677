from __future__ import annotations

import numpy as np
import optuna
import pytest

from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.cli import main
from rankadaptor_optuna.jobs.meta_train import train_prior
from rankadaptor_optuna.priors.store import PriorStore
from rankadaptor_optuna.views.priors import card_text


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Random trials of studies of several depths, scales and directions, and one study without any."""
    url = f"sqlite:///{tmp_path_factory.mktemp('many') / 'studies.db'}"
    storage, rng = optuna.storages.RDBStorage(url), np.random.default_rng(0)
    for i in range(8):
        n_layers, sign = 6 + 2 * i, (1, -1)[i % 2]
        space = RankSpace(n_layers, (2, 4, 8), "uniform:4")
        study = optuna.create_study(
            storage=storage, study_name=f"s{i}", direction="maximize" if sign > 0 else "minimize"
        )
        study.set_user_attr("rankadaptor:space", space.to_dict())
        for _ in range(24):
            ranks = rng.choice([2, 4, 8], n_layers)
            score = 10.0 ** (i - 4) * (ranks * np.exp(-((np.arange(n_layers) / n_layers - 0.3) ** 2) / 0.01)).sum()
            params = {space.name(layer): int(rank) for layer, rank in enumerate(ranks)}
            study.add_trial(optuna.create_trial(params=params, distributions=space.distributions(), value=sign * score))
    optuna.create_study(storage=storage, study_name="empty")
    return url


def test_a_prior_learned_from_a_database_is_stored_there_and_helps_on_held_out_studies(url):
    said = []
    learned = train_prior(url, "mine", say=said.append)
    assert str(learned.version) == "db:mine@1"
    assert "Not learned from: study 'empty': no trial" in said[0]
    stored = PriorStore(url).load("mine")
    assert stored.checksum == learned.prior.checksum
    assert [task["name"] for task in stored.card["tasks"]] == [f"s{i}" for i in range(8)]
    assert stored.card["held_out"]["gain"] > 0.05
    assert "from 8 tasks, 192 trials, 6 to 20 layers" in card_text(stored)
    assert "gain +" in card_text(stored)


def test_the_command_says_what_was_learned_and_how_to_use_it(url, capsys):
    assert main(["meta-train", "--storage", url, "--name", "few", "--study", "s0", "s1", "--study", "s[2]"]) == 0
    printed = capsys.readouterr().out
    assert "Learning from 3 studies, 72 trials" in printed
    assert "Rank correlation on held-out tasks (1), predicted from their first 8 trials:" in printed
    assert "Stored as db:few@1: RankAdaptorSampler(prior='db:few')" in printed


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--name", "a b"], "expected a prior like db:NAME"),
        (["--name", "a@1"], "without a version"),
        (["--study", "nothing"], "no study is named 'nothing'"),
        (["--study", "empty"], ": 0; meta-learning needs two"),
    ],
)
def test_what_cannot_be_learned_is_an_error_in_one_line(url, capsys, arguments, error):
    assert main(["meta-train", "--storage", url, *arguments]) == 2
    assert error in capsys.readouterr().err
