from __future__ import annotations

import pytest

from rankadaptor_optuna.jobs.output import OutputFolder, write_text


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


def test_texts_are_utf_8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr("locale.getencoding", lambda: "ascii", raising=False)
    write_text(tmp_path / "README.md", "0.5 ± 0.1 😀")
    assert (tmp_path / "README.md").read_bytes().decode() == "0.5 ± 0.1 😀"
