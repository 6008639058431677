from __future__ import annotations

import functools
import io
import os
from contextlib import suppress

import pytest
import torch
from transformers import AutoTokenizer, MistralConfig
from transformers.models.llama import modeling_llama

from benchmarks.families.models import tiny_model
from rankadaptor_optuna.pruning import importing, load_pruned, profile_of

KEPT = {1: ([0], range(40)), 2: ([0, 1], range(0, 64, 2)), 3: ([1], range(8, 64))}  # heads, channels

import_checkpoint = functools.partial(importing.import_checkpoint, allow_pickle=True)


@pytest.fixture
def pruned(make_model):
    """A LLaMA cut the way LLM-Pruner does: its modules' own tensors replaced, the config left as it was."""
    model = make_model(attention_bias=True)
    for index, (heads, channels) in KEPT.items():
        layer = model.model.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        keys = torch.arange(16).view(2, 8)[heads].flatten()
        queries = torch.arange(32).view(2, 16)[heads].flatten()
        rows = ((attention.q_proj, queries), (attention.k_proj, keys), (attention.v_proj, keys))
        channels = torch.tensor(list(channels))
        for linear, kept in (*rows, (mlp.gate_proj, channels), (mlp.up_proj, channels)):
            linear.weight = torch.nn.Parameter(linear.weight[kept].detach().clone())
            linear.out_features = len(kept)
            if linear.bias is not None:
                linear.bias = torch.nn.Parameter(linear.bias[kept].detach().clone())
        for linear, kept in ((attention.o_proj, queries), (mlp.down_proj, channels)):
            linear.weight = torch.nn.Parameter(linear.weight[:, kept].detach().clone())
            linear.in_features = len(kept)
    return model


@pytest.fixture
def save(tmp_path):
    def save(content, **options):
        torch.save(content, tmp_path / "pytorch_model.bin", **options)
        return tmp_path / "pytorch_model.bin"

    return save


def test_the_converted_model_computes_what_the_pickled_one_did(pruned, tokenizer, save, ids, tmp_path):
    found = import_checkpoint(save({"model": pruned, "tokenizer": tokenizer}), tmp_path / "out")
    loaded = load_pruned(tmp_path / "out")
    assert torch.equal(loaded(ids).logits, pruned(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a head")["input_ids"] == tokenizer("a head")["input_ids"]
    assert found.has_tokenizer
    assert not list((tmp_path / "out").glob("*.bin"))


def test_profile_says_what_is_missing_from_the_dense_shapes(pruned, make_model, save, tmp_path):
    found = import_checkpoint(save({"model": pruned}), tmp_path / "out")
    assert [entry.heads_removed for entry in found.profile] == [0, 0.5, 0, 0.5]
    assert [entry.channels_removed for entry in found.profile] == [0, 24 / 64, 0.5, 8 / 64]
    dense = make_model(attention_bias=True)
    for entry, before, after in zip(found.profile, dense.model.layers, pruned.model.layers, strict=True):
        sizes = [sum(p.numel() for p in layer.parameters()) for layer in (before, after)]
        # the config does not say how long a pruned bias was: it counts as it is
        assert entry.parameters_removed == pytest.approx(1 - sizes[1] / sizes[0], abs=0.01)
    assert profile_of(load_pruned(tmp_path / "out")) == found.profile
    assert not found.has_tokenizer


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_each_family_is_imported_as_its_own_class(make_model, family, save, ids, tmp_path):
    model = make_model(family)
    assert model(ids).logits.shape[1] > 8  # beyond Mistral's sliding window
    import_checkpoint(save({"model": model}), tmp_path / "out")
    loaded = load_pruned(tmp_path / "out")
    assert loaded.config.model_type.endswith(family)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("family", ["granite", "olmo2", "cohere", "gpt2"])
def test_other_families_are_refused_by_their_class(family, save, tmp_path):
    model = tiny_model(family)
    with pytest.raises(ValueError, match=rf"holds a {type(model).__name__} with a .*; import-checkpoint reads Llama"):
        import_checkpoint(save({"model": model}), tmp_path / "out")


def test_a_configuration_of_another_family_is_refused(model, save, tmp_path):
    model.config = MistralConfig()
    with pytest.raises(ValueError, match="holds a LlamaForCausalLM with a MistralConfig"):
        import_checkpoint(save({"model": model}), tmp_path / "out")


def test_half_precision_stays(pruned, save, tmp_path):
    import_checkpoint(save({"model": pruned.half()}), tmp_path / "out")
    assert load_pruned(tmp_path / "out", dtype="auto").dtype == torch.float16


def test_old_rope_settings_are_understood(pruned, save, ids, tmp_path):
    del pruned.config.rope_parameters
    pruned.config.rope_theta = 50000.0
    import_checkpoint(save({"model": pruned}), tmp_path / "out")
    assert load_pruned(tmp_path / "out").config.rope_parameters["rope_theta"] == 50000.0


def test_a_slow_tokenizer_is_taken_from_its_sentencepiece_model(pruned, save, tmp_path, monkeypatch):
    spm = pytest.importorskip("sentencepiece")
    proto = io.BytesIO()
    text = ["the rank of a layer", "a head and a channel"] * 50
    trainer = spm.SentencePieceTrainer
    trainer.train(sentence_iterator=iter(text), model_writer=proto, vocab_size=40, model_type="bpe", minloglevel=2)
    slow = type("LlamaTokenizer", (), {"__module__": "transformers.models.llama.modeling_llama"})
    monkeypatch.setattr(modeling_llama, "LlamaTokenizer", slow, raising=False)
    pickled = slow()
    pickled.sp_model_proto = proto.getvalue()
    pickled._bos_token, pickled._eos_token, pickled._unk_token = "<s>", "</s>", "<unk>"
    import_checkpoint(save({"model": pruned, "tokenizer": pickled}), tmp_path / "out")
    expected = spm.SentencePieceProcessor(model_proto=proto.getvalue()).encode("the head of a rank", add_bos=True)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("the head of a rank")["input_ids"] == expected


def test_a_tokenizer_may_come_from_elsewhere(pruned, tokenizer, save, tmp_path):
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    found = import_checkpoint(save({"model": pruned}), tmp_path / "out", tmp_path / "tokenizer")
    assert found.has_tokenizer
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("a head")["input_ids"] == tokenizer("a head")["input_ids"]


class Payload:
    """What an attacker pickles: a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("payload", "name"),
    [
        (lambda marker: Payload(os.system, f"touch {marker}"), "posix.system"),
        (lambda marker: Payload(eval, f"open({str(marker)!r}, 'w')"), "eval"),
        (lambda marker: Payload(getattr, Payload(__import__, "os"), "system"), "getattr"),
        (lambda marker: Payload(exec, f"open({str(marker)!r}, 'w')"), "exec"),
        (lambda marker: Payload(open, str(marker), "w"), "open"),
    ],
)
@pytest.mark.parametrize("where", ["model", "beside", "inside"])
def test_a_hostile_file_is_refused_by_the_name_it_uses_and_nothing_runs(pruned, save, tmp_path, payload, name, where):
    marker = tmp_path / "marker"
    bad = payload(marker)
    if where == "inside":
        pruned.config.note = bad
    content = {"model": bad if where == "model" else pruned, "tokenizer": bad if where == "beside" else None}
    with pytest.raises(ValueError, match=rf"names .*{name}.*does not belong in a model's checkpoint"):
        import_checkpoint(save(content), tmp_path / "out")
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


def test_names_of_model_packages_are_stood_for_not_called(pruned, save, tmp_path):
    """torch.nn and transformers hold functions that act; a file may name them, but gets none of them."""
    marker = tmp_path / "marker"
    pruned.config.note = Payload(torch.nn.modules.module.torch.save, {}, str(marker))
    pruned.config.more = Payload(modeling_llama.LlamaForCausalLM.from_pretrained, str(marker))
    with suppress(ValueError):  # either is safe
        import_checkpoint(save({"model": pruned}), tmp_path / "out")
    assert not marker.exists()


def test_a_file_without_a_llama_is_refused_by_what_it_lacks(pruned, save, tmp_path):
    del pruned.model.layers[2].self_attn.q_proj
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: it lacks model\.layers\.2\.self_attn\.q_proj\.weight"):
        import_checkpoint(save({"model": pruned}), tmp_path / "out")


def test_widths_that_do_not_fit_are_refused_by_name(pruned, save, tmp_path):
    up = pruned.model.layers[1].mlp.up_proj
    up.weight = torch.nn.Parameter(up.weight[:-1].detach().clone())
    with pytest.raises(ValueError, match=r"1\.mlp\.up_proj has shape \(39, 32\), which does not fit \(40, 32\)"):
        import_checkpoint(save({"model": pruned}), tmp_path / "out")


def test_other_files_are_refused(model, save, tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        import_checkpoint(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match=r"not in torch\.save's zip format"):
        import_checkpoint(save({"model": model}, _use_new_zipfile_serialization=False), tmp_path / "out")
    with pytest.raises(ValueError, match="holds no model object under 'model'"):
        import_checkpoint(save(model.state_dict()), tmp_path / "out")
    file = save({"model": model})
    damaged = bytearray(file.read_bytes())
    start = damaged.index(b"modeling_llama")
    damaged[start - 40 : start] = b"\xff" * 40
    file.write_bytes(damaged)
    with pytest.raises(ValueError, match="cannot be read"):
        import_checkpoint(file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pickle_is_read_only_where_that_is_allowed(pruned, save, tmp_path):
    with pytest.raises(ValueError, match=r"is a pickle.*allow_pickle=True \(--allow-pickle\)"):
        importing.import_checkpoint(save({"model": pruned}), tmp_path / "out")
    assert not (tmp_path / "out").exists()
