"""`prune`: cut a dense model down to size by a named method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedModel

from rankadaptor_optuna.pruning.calibration import draw_samples
from rankadaptor_optuna.pruning.checkpoint import (
    LayerProfile,
    build_pruned,
    check_prunable,
    profile_to_json,
    save_pruned,
)
from rankadaptor_optuna.pruning.gradients import Progress
from rankadaptor_optuna.pruning.importance import REDUCTIONS, Reduction
from rankadaptor_optuna.pruning.methods import (
    METHODS,
    RANKINGS,
    STRUCTURES,
    Options,
    Ranking,
    Structure,
    plan_pruning,
    size,
)
from rankadaptor_optuna.pruning.selection import default_kept
from rankadaptor_optuna.pruning.structure import transformer_layers
from rankadaptor_optuna.texts import read_texts


@dataclass(frozen=True)
class PrunedModel:
    """A pruned model and what pruning took from it.

    Attributes:
        model: The pruned model, on the CPU: an ordinary transformers model where all its layers have one shape, else
            one with layers of differing shape.
        profile: What each layer of the dense model lost, first to last.
        parameters_removed: Share of the parameters of all transformer blocks that is gone.
        total_parameters_removed: Share of all parameters that is gone; tied embeddings count once.
    """

    model: PreTrainedModel
    profile: list[LayerProfile]
    parameters_removed: float
    total_parameters_removed: float

    def save(self, path: str | PathLike[str], tokenizer: Any = None) -> None:  # noqa: ANN401
        """Write a checkpoint of safetensors and JSON: all of it or, on any failure, nothing.

        Args:
            path: Directory to create.
            tokenizer: Saved along if given.

        Raises:
            ValueError: `path` exists and is not an empty directory.
        """
        save_pruned(self.model, path, tokenizer)


def llm_pruner_preset(n_layers: int) -> dict[str, Any]:
    """Arguments of `prune` for the setting that LLM-Pruner publishes for LLaMA-7B: 0.25 on layers 4 to 29.

    Every layer of the window loses a quarter of its heads and channels, ranked within the layer by `"param_first"` on
    10 samples of 64 tokens; of 32 layers the first 4 and the last 2 stay whole, other depths in proportion.

    Args:
        n_layers: Depth of the dense model.
    """
    first, last = default_kept(n_layers)
    return {
        "method": "llm-pruner",
        "ratio": 0.25 * (n_layers - first - last) / n_layers,
        "criterion": "param_first",
        "ranking": "local",
        "keep_first": first,
        "keep_last": last,
        "n_samples": 10,
        "sample_length": 64,
    }


@torch.inference_mode(False)
def prune(
    model: PreTrainedModel,
    tokenizer: Any,  # noqa: ANN401
    *,
    method: str = "llm-pruner",
    ratio: float = 0.25,
    calibration: Sequence[str] | str | PathLike[str] | None = None,
    criterion: str | None = None,
    reduction: Reduction = "sum",
    ranking: Ranking = "global",
    structure: Structure = "units",
    steps: int = 1,
    keep_first: int | None = None,
    keep_last: int | None = None,
    multiple_of: int = 32,
    n_samples: int | None = None,
    sample_length: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PrunedModel:
    """Remove the least important parts of a model.

    * `"llm-pruner"` (arXiv 2305.11627): heads and MLP channels by Taylor importance (`unit_importance`, equation 2 of
      the RankAdaptor paper); its global ranking prunes layers unevenly. Or, with `structure="hidden"`, channels of the
      hidden state through the whole model.
    * `"shortened"` (Shortened LLaMA, arXiv 2402.02834): whole blocks (`block_importance`).
    * `"slimgpt"` (arXiv 2412.18110): heads and MLP channels layer by layer, by the error that is left after the other
      weights have made up for them, more in later layers (`slimgpt`).

    The model runs block by block on the device where it is: beside it, its samples' hidden states and one block's
    gradients or Hessians are held. The pruned model is put together in main memory.

    Args:
        model: A dense Llama, Mistral, Qwen2 or Qwen3 causal language model. It stays as it is: the result is
            a new model that shares no memory with it.
        tokenizer: The model's tokenizer.
        method: See above.
        ratio: Share of the parameters of all transformer blocks (not the embeddings) to remove, in (0, 1).
            Layers that stay whole count too, so the others lose more. Met as closely as the units allow.
        calibration: What to measure on: a list of texts, or a file or Hub data set (`read_texts`). Default: the
            embedded text.
        criterion: How units are scored. For `"llm-pruner"` `"param_first"` (default), `"param_second"`,
            `"param_mix"`, `"l1"`, `"l2"` or `"random"`; for `"shortened"` `"ppl"` (default), `"taylor"`, `"magnitude"`
            or `"random"`; for `"slimgpt"` `"obs"`.
        reduction: How `"llm-pruner"` turns the importance of a unit's projections into one number: `"sum"`, `"mean"`,
            `"max"`, `"prod"` or `"first"`. A hidden channel's is always the sum.
        ranking: Whether `"llm-pruner"` ranks the units of all layers together (`"global"`) or each layer's apart, so
            that all lose alike (`"local"`).
        structure: What `"llm-pruner"` removes: `"units"`, heads and MLP channels, or `"hidden"`, hidden channels of
            the whole model (`keep_first` and `keep_last` do not apply).
        steps: In how many steps `"llm-pruner"` gets there, measuring anew what the units left are worth.
        keep_first: How many layers at the start stay whole. Default: 4 of 32, in proportion, at least 1;
            none for `"slimgpt"`, whose first layers lose least.
        keep_last: How many layers at the end stay whole. Default: 2 of 32, in proportion, at least 1; none for
            `"slimgpt"`.
        multiple_of: MLP widths stay multiples of this, which hardware likes. A narrower MLP uses the largest
            proper divisor of its width. So does the hidden width, as far as the ratio is met within half a point.
        n_samples: Windows of text to calibrate on. Default: 10; 128 for `"slimgpt"`.
        sample_length: Tokens per window. Default: 128; 256 for `"slimgpt"` (its paper takes 256 windows of 2048).
        seed: Decides which windows; same seed, same result.
        progress: Called with (done, in all) during calibration.

    Returns:
        The pruned model, with what it lost.

    Raises:
        ValueError: An argument is out of range, the model cannot be pruned, or the ratio cannot be reached.
    """
    if method not in METHODS:
        raise ValueError(f"unknown pruning method {method!r}; known methods: {', '.join(METHODS)}")
    facts = METHODS[method]
    if not 0 < ratio < 1:
        raise ValueError(f"ratio must lie in (0, 1), not {ratio}: it is the share of block parameters to remove")
    for name, value in (("multiple_of", multiple_of), ("steps", steps)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    criterion = facts.criteria[0] if criterion is None else criterion
    _check_options(method, criterion, reduction, ranking, structure, steps)
    check_prunable(model)
    layers = transformer_layers(model)
    window = _window(len(layers), keep_first, keep_last, facts.keeps_ends and structure == "units")
    settings: dict[str, Any] = {
        "criterion": criterion,
        "keep_first": window[0],
        "keep_last": len(layers) - 1 - window[-1],
        "multiple_of": multiple_of,
        "n_samples": facts.n_samples if n_samples is None else n_samples,
        "sample_length": facts.sample_length if sample_length is None else sample_length,
        "seed": seed,
    }
    if method == "llm-pruner":
        settings |= {"reduction": reduction, "ranking": ranking, "structure": structure, "steps": steps}
    samples = draw_samples(
        tokenizer,
        read_texts(calibration),
        n_samples=settings["n_samples"],
        sample_length=settings["sample_length"],
        seed=seed,
    )
    options = Options(ratio, window, criterion, reduction, ranking, structure, steps, multiple_of, seed, progress)
    plan = plan_pruning(method, model, samples, options)
    record = {"method": method, "ratio": ratio, "settings": settings, "profile": profile_to_json(plan.profile)}
    pruned = build_pruned(model, plan.cut, record, plan.layers)
    removed = 1 - _blocks(pruned) / _blocks(model)
    return PrunedModel(pruned, plan.profile, removed, 1 - size(pruned) / size(model))


def _check_options(method: str, criterion: str, reduction: str, ranking: str, structure: str, steps: int) -> None:
    for name, value, known in (
        (f"criterion of {method}", criterion, METHODS[method].criteria),
        ("reduction", reduction, REDUCTIONS),
        ("ranking", ranking, RANKINGS),
        ("structure", structure, STRUCTURES),
    ):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}; known: {', '.join(known)}")
    given = {"reduction": (reduction, "sum"), "ranking": (ranking, "global"), "steps": (steps, 1)}
    if method != "llm-pruner":
        given["structure"] = (structure, "units")
    elif structure == "units":
        given = {}
    if unused := [f"{name}={value!r}" for name, (value, default) in given.items() if value != default]:
        what = "structure='hidden'" if method == "llm-pruner" else f"method {method!r}"
        raise ValueError(f"{what} knows no {', '.join(unused)}: leave it out")


def _window(n_layers: int, keep_first: int | None, keep_last: int | None, keeps_ends: bool) -> range:
    """The layers that may be pruned."""
    defaults = default_kept(n_layers) if keeps_ends else (0, 0)
    first = defaults[0] if keep_first is None else keep_first
    last = defaults[1] if keep_last is None else keep_last
    if first < 0 or last < 0:
        raise ValueError(f"keep_first and keep_last must not be negative, not {first} and {last}")
    if first + last >= n_layers:
        raise ValueError(
            f"nothing to prune: of the model's {n_layers} layers the first {first} and the last {last} "
            "are kept; lower keep_first or keep_last, or take a deeper model"
        )
    return range(first, n_layers - last)


def _blocks(model: PreTrainedModel) -> int:
    return sum(size(layer) for layer in transformer_layers(model))
