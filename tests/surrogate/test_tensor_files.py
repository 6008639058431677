from __future__ import annotations

import numpy as np
import pytest

from rankadaptor_optuna.surrogate.tensor_files import read_tensors, write_tensors


def test_arrays_of_any_layout_are_read_back(tmp_path):
    array = np.arange(6.0).reshape(2, 3)
    write_tensors(
        tmp_path / "f", {"turned": array.T, "spread": np.broadcast_to(1.0, 3)}, {"format": "a-1", "more": "this"}
    )
    tensors, metadata = read_tensors(tmp_path / "f", "thing", "a-1")
    np.testing.assert_array_equal(tensors["turned"], array.T)
    np.testing.assert_array_equal(tensors["spread"], np.ones(3))
    assert metadata == {"format": "a-1", "more": "this"}


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot write '.*no/such/folder/f'"):
        write_tensors(tmp_path / "no/such/folder/f", {"a": np.zeros(1)}, {"format": "a-1"})


def test_an_unreadable_file_is_named_by_kind_and_path(tmp_path):
    write_tensors(tmp_path / "f", {"a": np.zeros(1)}, {"format": "a-1"})
    with pytest.raises(ValueError, match=r"thing '.*/f' has format 'a-1'; this version reads 'b-1'"):
        read_tensors(tmp_path / "f", "thing", "b-1")
    with pytest.raises(ValueError, match=r"cannot read the thing '.*/g'"):
        read_tensors(tmp_path / "g", "thing", "b-1")
