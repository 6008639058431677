from __future__ import annotations

from pathlib import Path

import pytest

from rankadaptor_optuna import recommend
from rankadaptor_optuna.jobs.recipe import Recipe
from rankadaptor_optuna.jobs.results import Exported
from rankadaptor_optuna.views.card import write_card


@pytest.mark.parametrize(
    ("model", "dense"), [("my/model", "my/model"), ("embedded", "HuggingFaceTB/SmolLM2-135M-Instruct")]
)
def test_the_card_has_study_ranks_budget_and_losses(make_study, tmp_path, model, dense):
    found = recommend(make_study(4))
    recipe = Recipe.from_dict({"model": model, "space": {"budget": "uniform:8"}, "training": {"steps": 2}})
    write_card(Exported(found, recipe, "mine", "mysql://me:***@host/db", 2.5, 3.5, "/home/me/pruned", Path(tmp_path)))
    card = (tmp_path / "README.md").read_text()
    assert card.startswith('---\nlibrary_name: peft\nbase_model: "/home/me/pruned"\n')
    assert f"# LoRA recovery of a pruned {dense}," in card
    assert 'AutoModelForCausalLM.from_pretrained("/home/me/pruned")' in card
    assert f'PeftModel.from_pretrained(model, "{tmp_path}/adapter")' in card
    for part in ("4 trials of study `mine`", "mysql://me:***@host/db", f"{found.cost:,.0f} (budget uniform:8)"):
        assert part in card
    assert "2.5000 (perplexity 12.18); without recovery 3.5000 (perplexity 33.12)" in card
    assert "made the model worse" not in card
    assert '"steps": 2' in card
    assert found.all_ranks.keys() - found.ranks.keys() == {0, 7}
    for layer, rank in found.all_ranks.items():
        assert f"| {layer} | {rank} | {'yes' if layer in found.ranks else 'no'} |" in card


def test_the_card_says_that_a_recovery_made_the_model_worse(make_study, tmp_path):
    write_card(Exported(recommend(make_study(4)), Recipe(), "mine", "sqlite://", 3.5, 2.5, "base", tmp_path))
    assert "12.18). **The recovery made the model worse.** The search" in (tmp_path / "README.md").read_text()


def test_names_of_others_are_no_markup_in_the_card(make_study, tmp_path):
    recipe = Recipe.from_dict({"model": "x\nlicense: evil\x1b[2J<script>"})
    storage, evil = "sqlite:///a`b.db", 'x")\nlicense: evil\x1b[2J'
    write_card(
        Exported(recommend(make_study(4)), recipe, "s`\n# Run `rm -rf`\x1b[31m", storage, 2.5, 3.5, evil, tmp_path)
    )
    card = (tmp_path / "README.md").read_text()
    assert card.replace("\n", "").isprintable()
    assert "\nlicense:" not in card
    assert "\n# Run" not in card
    assert "# LoRA recovery of a pruned x license: evil\\\\x1b\\[2J&lt;script&gt;, with" in card
    assert "study `s' # Run 'rm -rf'\\x1b[31m` in\n`sqlite:///a'b.db`." in card
