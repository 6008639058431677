from __future__ import annotations

import types

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from benchmarks.families.models import tiny_model
from rankadaptor_optuna import RankSpace, RecoveryObjective
from rankadaptor_optuna.llm.layers import read_layers
from rankadaptor_optuna.ranks import TARGETS, LoraSettings
from rankadaptor_optuna.recovery.lora import attached, check_attachable, detached, lora_config, trainable_parameters
from rankadaptor_optuna.recovery.models import n_parameters
from rankadaptor_optuna.recovery.references import adapter_parameters, fisher_information
from rankadaptor_optuna.recovery.train import TrainingConfig, train

ALL = ["phi3", "opt", "gpt2", "gemma3n_text", "qwen3_moe", "deepseek_v3", "jamba", "zamba2", "llava"]
pytestmark = pytest.mark.filterwarnings("ignore:.*no adapters in")


@pytest.mark.parametrize("family", ALL)
def test_the_parameters_counted_are_those_trained_each_one_and_again(family, ids):
    model = tiny_model(family)
    names = [name for name, _ in model.named_modules()]
    space = RankSpace.from_model(model)
    ranks = dict(zip(space.layers, (2, 4, 8, 12), strict=True))
    for _ in range(2):  # the second attaches to the model that the first has left
        with attached(model, lora_config(space.with_fixed(ranks), LoraSettings(space.targets)), seed=0) as adapted:
            assert trainable_parameters(adapted) == adapter_parameters(adapted) == space.cost(ranks)
            train(adapted, ids, TrainingConfig(steps=2, batch_size=2), seed=0)
            assert all((p != 0).any() for name, p in adapted.named_parameters() if "lora_B" in name)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize(
    ("family", "note"),
    [
        ("qwen3_moe", r"mlp\.experts\.gate_up_proj, mlp\.experts\.down_proj \(fused experts"),
        ("gpt_oss", r"mlp\.experts\.gate_up_proj, mlp\.experts\.down_proj \(fused experts"),
        ("llava", r"model\.vision_tower\.encoder\.layers \(not part of the text decoder"),
        ("mamba", r"mixer\.x_proj, mixer\.dt_proj, mixer\.out_proj \(bypassed by the kernels"),
        ("zamba2", r"shared_transformer\.self_attn\.q_proj.* \(shared by several layers"),
        ("phimoe", r"mlp\.router \(a router"),
        ("trocr", r"encoder_attn\.k_proj, .* \(attends to an encoder"),
    ],
)
def test_modules_without_adapter_are_named(family, note):
    with pytest.warns(UserWarning, match=note):
        RankSpace.from_model(tiny_model(family))


def test_a_vision_tower_is_never_adapted():
    model = tiny_model("llava")
    space = RankSpace.from_model(model)
    with attached(model, lora_config(space.uniform(), LoraSettings(space.targets)), seed=0) as adapted:
        names = [name for name, module in adapted.named_modules() if getattr(module, "lora_A", None)]
    assert len(names) == 28
    assert all("language_model.layers" in name for name in names)


@pytest.mark.parametrize("family", ["gemma3n_text", "deepseek_v3", "jamba", "granitemoehybrid"])
def test_layers_that_differ_by_design_are_searched_alike(family):
    space = RankSpace.from_model(tiny_model(family))
    assert space.layers == (0, 1, 2, 3)
    assert space.profile == (0,) * 4


def test_damage_is_relative_to_the_designed_widths():
    model = tiny_model("gemma3n_text")  # MLP widths 64, 64, 48 and 48
    wide = RankSpace.from_model(model).costs[0]
    mlp = model.model.layers[2].mlp
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, torch.nn.Linear(32, 24, bias=False))
    mlp.down_proj = torch.nn.Linear(24, 32, bias=False)
    space = RankSpace.from_model(model)
    assert space.layers == (2,)
    assert space.fixed_ranks == {0: 8, 1: 8, 3: 8}
    assert space.costs[0] == wide - 3 * 40


def test_layers_that_differ_for_an_unknown_reason_are_a_question():
    layers = [{"a": torch.nn.Linear(4, 4)}, {"b": torch.nn.Linear(4, 8)}]
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(map(torch.nn.ModuleDict, layers))})
    with pytest.raises(ValueError, match=r"layers of ModuleDict have different modules.*pass unpruned_rank=None"):
        RankSpace.from_model(model)
    assert RankSpace.from_model(model, unpruned_rank=None).layers == (0, 1)


def test_a_model_with_an_adapter_is_refused(model):
    with pytest.raises(ValueError, match="LlamaForCausalLM carries a PEFT adapter already; merge it"):
        RankSpace.from_model(peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).base_model.model)


def test_models_that_cannot_be_trained_are_refused(model):
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder model"):
        RankSpace.from_model(tiny_model("t5"))
    model.hf_quantizer = types.SimpleNamespace(
        is_trainable=False, quantization_config=types.SimpleNamespace(quant_method="awq")
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM is quantised by awq, through which no gradient flows"):
        RankSpace.from_model(model)


def test_a_model_without_a_language_model_head_is_refused(tokenizer, texts):
    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2)
    config.num_attention_heads = config.num_key_value_heads = 4
    classifier = LlamaForSequenceClassification(config)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification has no language-model head"):
        RecoveryObjective(classifier, tokenizer, RankSpace(2), train=texts, validation=texts)


def test_llamas_names_stand_for_all_linear_modules_where_one_is_missing():
    with pytest.warns(UserWarning, match="has no q_proj, k_proj, v_proj, gate_proj, up_proj to adapt; all its linear"):
        space = RankSpace.from_model(tiny_model("phi3"), targets=TARGETS)
    assert space == RankSpace.from_model(tiny_model("phi3"))


@pytest.mark.parametrize("targets", [["q_proj", "v_porj"], ["q_proj", "lm_head"]])
def test_a_target_that_is_missing_is_refused(model, targets):
    message = rf"no modules named \['{targets[1]}'\] to adapt below 'model.layers.<i>.'; there are q_proj, k_proj"
    with pytest.raises(ValueError, match=message):
        RankSpace.from_model(model, targets=targets)


def test_targets_may_be_all_or_one_but_not_none(model):
    assert RankSpace.from_model(model, targets="all-linear") == RankSpace.from_model(model)
    assert RankSpace.from_model(model, targets="q_proj") == RankSpace.from_model(model, targets=["q_proj"])
    with pytest.raises(ValueError, match="targets must name at least one module, got none"):
        RankSpace.from_model(model, targets=[])


def test_modules_that_layers_share_get_no_adapter_and_are_no_damage(model):
    for layer in model.model.layers:
        layer.self_attn = model.model.layers[0].self_attn
    space = RankSpace.from_model(model)
    assert space.targets == ("gate_proj", "up_proj", "down_proj")
    assert space.layers == (0, 1, 2, 3)


def test_an_objective_adapts_the_modules_of_its_space(tokenizer, texts):
    model = tiny_model("phi3")
    for targets in (None, ["qkv_proj"]):
        space = RankSpace.from_model(model, targets=targets)
        job = RecoveryObjective(model, tokenizer, space, train=texts, validation=texts, block_length=32)
        assert job.lora.targets == space.targets
        with job.recovered(space.uniform()) as adapted:
            assert trainable_parameters(adapted) == space.cost(space.uniform())
    with pytest.raises(ValueError, match=r"counts 3,072 trainable parameters at uniform ranks.* o_proj have 2,048"):
        RecoveryObjective(model, tokenizer, space, train=texts, validation=texts, targets=["o_proj"])


def test_an_adapter_that_differs_from_the_count_is_refused(model):
    layers = read_layers(model, None, "layer")
    with pytest.raises(ValueError, match=r"adapter has 256 trainable parameters, but the rank space counts 2,048"):
        check_attachable(model, LoraSettings(("q_proj",)), layers)


def test_arguments_of_peft_are_complete_for_any_name_of_the_layers(tmp_path):
    model = tiny_model("gpt2")
    space = RankSpace.from_dict(RankSpace.from_model(model, (0, 4, 8)).to_dict())
    arguments = space.with_fixed({0: 4, 1: 0, 2: 8, 3: 4})
    adapted = peft.get_peft_model(model, peft.LoraConfig(**arguments.lora_arguments(LoraSettings(space.targets))))
    ranks = {}
    for name, module in adapted.named_modules():
        if getattr(module, "lora_A", None):
            ranks.setdefault(int(name.split(".h.")[1].split(".")[0]), set()).add(module.r["default"])
    assert ranks == {0: {4}, 2: {8}, 3: {4}}
    assert space.by_module({"base_model.model.transformer.h.2.attn.c_attn": 3.0}) == {0: 0, 1: 0, 2: 3.0, 3: 0}


def test_nested_wrappers_are_removed():
    model = tiny_model("qwen3_moe")
    names = [name for name, _ in model.named_modules()]
    config = peft.LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    with detached(model):
        adapted = peft.get_peft_model(model, config)
        assert any(hasattr(getattr(module, "base_layer", None), "base_layer") for module in adapted.modules())
    assert [name for name, _ in model.named_modules()] == names


class Packed(torch.nn.Module):
    """A linear module with two 4-bit weights per byte, as bitsandbytes stores them."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.nn.Parameter(torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8), False)


def test_packed_weights_are_counted_by_their_features(model, texts):
    dense, cost = n_parameters(model), sum(RankSpace.from_model(model).costs)
    with attached(model, lora_config(dict.fromkeys(range(4), 2)), seed=0) as adapted:
        for module in adapted.modules():
            if getattr(module, "lora_A", None):
                module.base_layer = Packed(module.base_layer)
        assert adapter_parameters(adapted) == 2 * cost
    assert n_parameters(model) == dense
    assert sum(RankSpace.from_model(model).costs) == cost
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj is quantised, so it has no Fisher information"):
        fisher_information(model, [])


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"vocab_size": 100}, r"token id \d+, but the model knows 100 tokens: pass the model's own tokenizer"),
        ("gpt2", {}, r"an example has 160 tokens, but GPT2LMHeadModel knows 128 positions; lower block_length"),
    ],
)
def test_data_that_a_model_does_not_take_is_refused(family, changes, message, tokenizer, texts):
    model = tiny_model(family)
    if changes:
        model.resize_token_embeddings(changes["vocab_size"])
    data = {"train": texts, "validation": texts, "block_length": 160}
    with pytest.raises(ValueError, match=message):
        RecoveryObjective(model, tokenizer, RankSpace.from_model(model), **data)
