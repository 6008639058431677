from __future__ import annotations

import pytest

from rankadaptor_optuna.jobs.output import OutputFolder


@pytest.mark.parametrize("name", ["settings.json", "results.json"])
@pytest.mark.parametrize("text", ["", '{"model": "/tm', "[1, 2]", "null", "[" * 100_000, "\x00"])
def test_a_damaged_file_of_an_earlier_run_is_named(tmp_path, name, text):
    folder = OutputFolder(tmp_path, {"model": "m"})
    folder.record("loss", 1.0)
    assert OutputFolder(tmp_path, {"model": "m"}).measured == {"loss": 1.0}
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name} is damaged: .*\. Restore the file, or ") as error:
        OutputFolder(tmp_path, {"model": "m"})
    assert "\n" not in str(error.value)
