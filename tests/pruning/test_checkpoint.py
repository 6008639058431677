from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankadaptor_optuna.pruning import load_pruned, profile_of, prune
from rankadaptor_optuna.pruning.modeling import PrunedLlamaConfig, PrunedLlamaForCausalLM

WITHOUT_US = """
import sys
sys.modules["rankadaptor_optuna"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
path, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
torch.save(model(torch.arange(24).view(2, 12)).logits.detach(), out)
"""

FAMILIES = ("llama", "llama-biased", "mistral", "qwen2", "qwen3")

# Opens checkpoints as a user would, in a process of its own, and writes down what each model computes.
READER = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
import rankadaptor_optuna
torch.set_num_threads(1)
for path in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.arange(24).view(2, 12)
    args = dict(max_new_tokens=12, do_sample=False, pad_token_id=0)
    static = dict(cache_implementation="static", disable_compile=True)
    torch.save({
        "type": type(model).__name__,
        "logits": model(ids).logits.detach(),
        "dynamic": model.generate(ids, **args),
        "static": model.generate(ids, **static, **args),
        "chunked": model.generate(ids, prefill_chunk_size=4, **static, **args),
        "none": model.generate(ids, use_cache=False, **args),
        "tokens": AutoTokenizer.from_pretrained(path)("a rank")["input_ids"],
    }, path + ".out")
"""


@pytest.fixture
def pruned(model, tokenizer, settings):
    """Layers 1 and 2 differ from each other and from the dense ones, in heads and in channels."""
    result = prune(model, tokenizer, ratio=0.15, **settings)
    assert len({tuple(sorted(shape.items())) for shape in result.model.config.layer_shapes}) == 3
    return result


def test_a_new_process_computes_and_generates_the_same(make_model, tokenizer, settings, tmp_path):
    results = {family: prune(make_model(family), tokenizer, ratio=0.15, **settings) for family in FAMILIES}
    for family, result in results.items():
        result.save(tmp_path / family, tokenizer)
    subprocess.run([sys.executable, "-c", READER, *(str(tmp_path / family) for family in FAMILIES)], check=True)

    ids = torch.arange(24).view(2, 12)
    for family, result in results.items():
        found = torch.load(tmp_path / f"{family}.out", weights_only=True)
        expected = result.model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert found["type"] == type(result.model).__name__
        assert torch.equal(found["logits"], result.model(ids).logits)
        for way in ("dynamic", "static", "chunked", "none"):
            assert torch.equal(found[way], expected), (family, way)
        assert found["tokens"] == tokenizer("a rank")["input_ids"]


def test_it_opens_without_this_package_by_the_code_in_the_checkpoint(pruned, tmp_path):
    pruned.save(tmp_path / "model")
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    subprocess.run([sys.executable, "-c", WITHOUT_US, tmp_path / "model", tmp_path / "out"], check=True, env=env)
    found = torch.load(tmp_path / "out", weights_only=True)
    assert torch.equal(found, pruned.model(torch.arange(24).view(2, 12)).logits)


def test_layers_of_one_shape_make_an_ordinary_model_without_code(model, tokenizer, settings, ids, tmp_path):
    """A ratio that takes one head of two and half of the channels from every layer alike."""
    result = prune(model, tokenizer, ratio=0.5 * 96 / 98, keep_first=0, keep_last=0, ranking="local", **settings)
    assert type(result.model) is type(model)
    config = result.model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size) == (2, 1, 32)
    assert config.head_dim == 8
    result.save(tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.py"))
    loaded = load_pruned(tmp_path / "model")
    assert type(loaded) is type(model)
    assert torch.equal(loaded(ids).logits, result.model(ids).logits)
    assert profile_of(loaded) == result.profile


def test_saving_a_loaded_model_again_changes_nothing(pruned, tmp_path):
    pruned.save(tmp_path / "first")
    load_pruned(tmp_path / "first").save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_config_keeps_dense_values_and_records_the_pruning(pruned, tmp_path):
    pruned.save(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["model_type"] == "pruned_llama"
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (4, 2)
    assert config["intermediate_size"] == 64
    assert config["layer_shapes"][0] == {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 64,
    }
    assert config["pruning"]["method"] == "llm-pruner"
    assert config["pruning"]["ratio"] == 0.15
    assert config["pruning"]["settings"] == {
        "criterion": "param_first",
        "keep_first": 1,
        "keep_last": 1,
        "multiple_of": 8,
        "n_samples": 4,
        "sample_length": 32,
        "seed": 0,
        "reduction": "sum",
        "ranking": "global",
        "structure": "units",
        "steps": 1,
    }


def test_the_checkpoint_holds_json_safetensors_and_the_code_of_its_class(pruned, tokenizer, tmp_path):
    pruned.save(tmp_path / "deep" / "model", tokenizer)
    files = list((tmp_path / "deep" / "model").iterdir())
    assert {file.suffix for file in files} == {".json", ".safetensors", ".py"}
    assert [file.name for file in files if file.suffix == ".py"] == ["modeling.py"]
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["model"]


def test_profile_survives_the_round_trip_and_peft(pruned, model, tmp_path):
    pruned.save(tmp_path / "model")
    loaded = load_pruned(tmp_path / "model")
    assert profile_of(loaded) == pruned.profile == profile_of(pruned.model)
    assert profile_of(get_peft_model(loaded, LoraConfig(target_modules=["q_proj"]))) == pruned.profile
    assert profile_of(model) is None


def test_lora_attaches_trains_and_merges(pruned, ids):
    model = get_peft_model(
        pruned.model,
        LoraConfig(target_modules="all-linear", init_lora_weights=False, rank_pattern={"q_proj": 2}),
    )
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    expected = model.eval()(ids).logits
    merged = model.merge_and_unload()
    assert type(merged) is type(pruned.model)
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_loads_in_bfloat16_and_with_either_attention(pruned, ids, tmp_path):
    pruned.save(tmp_path / "model")
    half = load_pruned(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(ids).logits.isfinite().all()
    eager, sdpa = (load_pruned(tmp_path / "model", attn_implementation=name)(ids).logits for name in ("eager", "sdpa"))
    torch.testing.assert_close(eager, sdpa, rtol=1e-4, atol=1e-4)


def test_a_model_made_from_its_config_has_the_pruned_shapes_and_sane_weights(pruned):
    fresh = AutoModelForCausalLM.from_config(pruned.model.config)
    assert {n: p.shape for n, p in fresh.named_parameters()} == {n: p.shape for n, p in pruned.model.named_parameters()}
    # initializer_range 0.2, as the dense model's projections
    assert fresh.model.layers[1].mlp.up_proj.weight.std().item() == pytest.approx(0.2, rel=0.2)


def test_the_dtype_of_the_dense_model_is_kept(model, tokenizer, settings, tmp_path):
    prune(model.bfloat16(), tokenizer, ratio=0.1, **settings).save(tmp_path / "model")
    assert load_pruned(tmp_path / "model").dtype == torch.bfloat16


def test_classes_can_be_pickled_by_name():
    assert pickle.loads(pickle.dumps(PrunedLlamaForCausalLM)) is PrunedLlamaForCausalLM
    assert pickle.loads(pickle.dumps(PrunedLlamaConfig)) is PrunedLlamaConfig


def test_a_config_without_layer_shapes_is_refused():
    with pytest.raises(ValueError, match="needs layer_shapes for 2 layers, not 0"):
        PrunedLlamaForCausalLM(
            PrunedLlamaConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=8)
        )


def test_a_failed_save_leaves_nothing_behind(pruned, tmp_path):
    class BrokenTokenizer:
        def save_pretrained(self, path):
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        pruned.save(tmp_path / "model", BrokenTokenizer())
    assert list(tmp_path.iterdir()) == []


def test_saving_over_something_is_refused_and_into_an_empty_directory_is_not(pruned, tmp_path):
    (tmp_path / "empty").mkdir()
    pruned.save(tmp_path / "empty")
    assert (tmp_path / "empty" / "config.json").exists()
    with pytest.raises(ValueError, match="exists and is not empty"):
        pruned.save(tmp_path / "empty")


def test_loading_an_ordinary_model_is_refused(model, tmp_path):
    model.save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="ordinary LlamaForCausalLM, not a pruned model"):
        load_pruned(tmp_path / "dense")


def test_the_tokenizer_opens_from_the_checkpoint(pruned, tokenizer, tmp_path):
    pruned.save(tmp_path / "model", tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "model")("head")["input_ids"] == tokenizer("head")["input_ids"]


def test_trainer_device_map_and_lm_eval_take_it_from_disk(pruned, tokenizer, tmp_path):
    from lm_eval.models.huggingface import HFLM
    from transformers import Trainer, TrainingArguments

    pruned.save(tmp_path / "model", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", device_map="auto")
    assert torch.equal(model(torch.arange(12)[None]).logits, pruned.model(torch.arange(12)[None]).logits)
    lm = HFLM(pretrained=str(tmp_path / "model"), tokenizer=str(tmp_path / "model"), batch_size=2, device="cpu")
    assert type(lm.model) is PrunedLlamaForCausalLM
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    rows = [{"input_ids": list(range(12)), "labels": list(range(12))} for _ in range(4)]
    arguments = TrainingArguments(tmp_path / "trainer", max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    Trainer(model, arguments, train_dataset=rows).train()
    assert not torch.equal(model.model.layers[1].mlp.up_proj.weight, before)


def test_a_generation_configuration_that_transformers_refuses_to_save_is_kept(model, tokenizer, settings, tmp_path):
    model.generation_config.temperature = 0.6  # without sampling, as in Llama 2's checkpoints
    prune(model, tokenizer, **settings).save(tmp_path / "pruned", tokenizer)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned")
    assert opened.generation_config.temperature == 0.6
    assert model.generation_config.temperature == 0.6
