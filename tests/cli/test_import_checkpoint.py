from __future__ import annotations

from rankadaptor_optuna.cli import main


def test_a_checkpoint_is_converted_or_refused_in_one_line(model, tokenizer, tmp_path, capsys):
    import torch

    torch.save({"model": model, "tokenizer": tokenizer}, tmp_path / "model.bin")
    torch.save({"model": print}, tmp_path / "bad.bin")
    assert main(["import-checkpoint", str(tmp_path / "model.bin"), str(tmp_path / "out"), "--allow-pickle"]) == 0
    assert "4 layers" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert main(["import-checkpoint", str(tmp_path / "bad.bin"), str(tmp_path / "other"), "--allow-pickle"]) == 2
    error = capsys.readouterr().err
    assert "print" in error
    assert error.count("\n") == 1
    assert not (tmp_path / "other").exists()
