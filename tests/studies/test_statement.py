from __future__ import annotations

import numpy as np
import pytest

from rankadaptor_optuna.studies.statement import gain_statement, uniform_statement
from rankadaptor_optuna.studies.verification import Confirmation

EIGHT = np.asarray([8.0, 8.0])


@pytest.mark.parametrize(
    ("uniform", "n_verified", "statement"),
    [
        (EIGHT, 0, "Keep uniform rank 8: after 20 trials, no other configuration is safely better."),
        (
            np.asarray([8.0, 4.0]),
            3,
            "Keep the middle of each rank's range: after 20 trials and 3 configurations verified on fresh seeds, no "
            "other configuration is safely better.",
        ),
    ],
)
def test_where_uniform_is_recommended(uniform, n_verified, statement):
    assert uniform_statement(uniform, 20, n_verified) == statement


def test_fixed_layers_are_named_beside_the_uniform_rank():
    fixed = {0: 12, 3: 12, 4: 2, 5: 8}
    name = "uniform rank 8 in the searched layers (rank 12 in layers 0, 3; rank 2 in layers 4)"
    assert uniform_statement(EIGHT, 20, 0, fixed).startswith(f"Keep {name}: after 20 trials")
    statement = gain_statement(EIGHT, 20, 0.3, (0.1, 0.5), holds_on_own_seed=True, confirmed=None, fixed=fixed)
    assert f"predicted gain over {name} on fresh seeds" in statement


@pytest.mark.parametrize(
    ("low", "holds", "verified", "support"),
    [
        (0.1, True, False, "Supported by the data"),
        (0.1, True, True, "Supported by the data"),
        (0.0, True, False, "Supported on the search's own seed only"),
        (-0.1, False, False, "Not yet supported by the data"),
        (-0.1, True, True, "Not supported by the search alone"),
    ],
)
def test_a_predicted_gain_is_supported_where_its_interval_is_above_0(low, holds, verified, support):
    confirmed = Confirmation(0.5, (0.25, 0.75), n_seeds=3, n_verified=1) if verified else None
    statement = gain_statement(EIGHT, 20, 0.3, (low, 0.5), holds_on_own_seed=holds, confirmed=confirmed)
    predicted = f"predicted gain over uniform rank 8 on fresh seeds +0.3000 (95% interval {low:+.4f} to +0.5000)"
    measured = " Confirmed on 3 fresh seeds: measured gain +0.5000 (95% interval +0.2500 to +0.7500)."
    assert statement == f"{support}: {predicted}, from 20 trials." + (measured if verified else "")


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        ((0.1, 0.5), "Confirmed"),
        ((0.0, 0.5), "Not confirmed"),
        ((-0.5, 0.0), "Not confirmed"),
        ((-0.5, -0.1), "Worse than uniform"),
        ((-0.5, 0.5), "Not confirmed"),
    ],
)
@pytest.mark.parametrize("n_verified", [1, 2])
def test_a_measured_gain_is_confirmed_where_its_interval_is_above_0(interval, verdict, n_verified):
    confirmed = Confirmation(0.0, interval, n_seeds=3, n_verified=n_verified)
    statement = gain_statement(EIGHT, 20, 0.3, (0.1, 0.5), holds_on_own_seed=True, confirmed=confirmed)
    assert f" {verdict} on 3 fresh seeds: measured gain +0.0000" in statement
    allows = "The interval, not the gain, allows for the choice among 2 configurations."
    assert (allows in statement) is (n_verified == 2)


def test_small_gains_keep_their_digits():
    given = {"holds_on_own_seed": True, "confirmed": None}
    statement = gain_statement(np.full(4, 8.0), 20, 4.93e-6, (1.57e-6, 8.29e-6), **given)
    assert "+4.93e-06 (95% interval +1.57e-06 to +8.29e-06)" in statement
