"""Reference methods of rank allocation, for comparison with a recommendation on the same recovery.

AdaLoRA (arXiv 2303.10512) and EVA (arXiv 2410.07170) by PEFT, and ranks in proportion to the Fisher information.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from rankadaptor_optuna.llm.layers import layer_of, read_layers
from rankadaptor_optuna.ranks import TARGETS, LoraSettings, Ranks
from rankadaptor_optuna.recovery.data import Examples
from rankadaptor_optuna.recovery.lora import adapted_model, detached, fixed_rng
from rankadaptor_optuna.recovery.train import TrainingConfig, batches, train

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

_INITIAL = 1.5  # AdaLoRA's initial rank as a multiple of its final mean rank (PEFT's defaults: 12 and 8)
_EVA_EXAMPLES = 16  # examples whose inputs EVA decomposes; set by hand
_EVA_RHO = 2  # EVA's candidates per module as a multiple of the mean rank (PEFT's default)


def adapter_parameters(model: Any) -> int:  # noqa: ANN401
    """Returns the adapter parameters in use: rank x (in + out) of each module; AdaLoRA's masked ranks do not count."""
    total = 0
    for module in model.modules():
        ranks = getattr(module, "lora_E", None) or getattr(module, "lora_A", None)
        if not ranks:
            continue
        for name, weight in ranks.items():
            rank = int((weight != 0).sum()) if getattr(module, "lora_E", None) else weight.out_features
            # features, not the weight's shape: quantised weights are packed
            total += rank * (module.in_features + module.out_features) if name in module.active_adapters else 0
    return total


def check_adalora(training: TrainingConfig) -> None:
    """Checks that a recovery is long enough for AdaLoRA's three phases.

    Raises:
        ValueError: It has under 4 steps.
    """
    if training.steps < 4:
        raise ValueError(f"AdaLoRA needs at least 4 training steps, got {training.steps}.")


@contextmanager
def adalora(
    model: Any,  # noqa: ANN401
    data: Examples,
    training: TrainingConfig,
    *,
    parameters: float,
    seed: int,
    lora: LoraSettings | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Iterator[Any]:
    """Recovers a model by AdaLoRA, which removes ranks during training; removes the adapter on exit.

    Training starts from 1.5 times the final mean rank, as PEFT's defaults do. Ranks are constant for the first tenth of
    the steps and in the last third (set by hand). AdaLoRA's budget is a number of ranks; here it is one of parameters,
    as a rank costs more in some modules of a pruned model than in others.

    Args:
        model: The pruned model.
        data: Training examples.
        training: Settings of the training loop.
        parameters: Most adapter parameters in use at the end.
        seed: Seed of the initialisation and the data order.
        lora: The adapters' other settings. Default: ``LoraSettings()``.
        on_step: Called with (step, loss) after each step.

    Yields:
        The recovered model, with its adapter.

    Raises:
        ValueError: The training has fewer than 4 steps, too few for AdaLoRA's three phases.
        FloatingPointError: The loss is not finite.
    """
    from peft import AdaLoraConfig

    lora = lora or LoraSettings()
    training = training.for_examples(len(data))
    check_adalora(training)
    steps, rank = training.steps, _mean_rank(model, lora, parameters)
    config = AdaLoraConfig(
        target_r=rank,
        init_r=max(rank + 1, round(_INITIAL * rank)),
        tinit=steps // 10,
        tfinal=max(1, steps // 3),
        deltaT=max(1, steps // 100),
        total_step=steps,
        lora_alpha=lora.lora_alpha(rank),
        target_modules=list(read_layers(model, lora.targets, "layer").modules),
        lora_dropout=lora.dropout,
        task_type="CAUSAL_LM",
    )
    with detached(model):
        with fixed_rng(seed):
            adapted: Any = adapted_model(model, config)
        _keep_parameters(adapted.base_model.rankallocator, adapted, parameters)
        allocate = adapted.base_model.update_and_allocate
        train(adapted, data, training, seed=seed, on_step=on_step, before_zero_grad=allocate)
        yield adapted


def _mean_rank(model: Any, lora: LoraSettings, parameters: float) -> int:  # noqa: ANN401
    """Returns the rank in all adapted modules that comes closest to a number of parameters, at least 1."""
    return max(1, round(parameters / sum(read_layers(model, lora.targets, "layer").costs.values())))


def _keep_parameters(allocator: Any, adapted: Any, parameters: float) -> None:  # noqa: ANN401
    """Makes PEFT's allocator of AdaLoRA remove the least important ranks down to a number of parameters."""
    modules = adapted.base_model.model.named_modules()
    costs = {
        f"{name}.lora_E.{allocator.adapter_name}": module.in_features + module.out_features
        for name, module in modules
        if getattr(module, "lora_E", None)
    }
    mask, target, largest = allocator.mask_to_budget, allocator.target_bgt, max(costs.values())

    def mask_to_budget(model: Any, budget: int) -> dict[str, list[bool]]:  # noqa: ANN401
        allowed, kept = parameters * budget / target, allocator.init_bgt
        excess = allocator.peft_config.init_r * sum(costs.values()) - allowed
        while True:
            kept = max(1, kept - max(1, math.ceil(excess / largest)))
            pattern: dict[str, list[bool]] = mask(model, kept)
            excess = sum(costs[name] * sum(in_use) for name, in_use in pattern.items()) - allowed
            if excess <= 0 or kept == 1:
                return pattern

    allocator.mask_to_budget = mask_to_budget


@contextmanager
def eva(
    model: Any,  # noqa: ANN401
    data: Examples,
    training: TrainingConfig,
    *,
    parameters: float,
    seed: int,
    lora: LoraSettings | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> Iterator[Any]:
    """Recovers a model by EVA, which allocates ranks by the variance of each module's inputs before training.

    As in PEFT (rho = 2), the singular vectors of the inputs are also the initialisation. Here they are computed from
    one batch of 16 training examples; PEFT's incremental PCA repeats its batches until every component has converged,
    which takes minutes.

    Args:
        model: The pruned model.
        data: Training examples.
        training: Settings of the training loop.
        parameters: Most adapter parameters.
        seed: Seed of the data order and the initialisation.
        lora: The adapters' other settings. Default: ``LoraSettings()``.
        on_step: Called with (step, loss) after each step.

    Yields:
        The recovered model, with its adapter.

    Raises:
        FloatingPointError: The loss is not finite.
    """
    from peft import EvaConfig, LoraConfig, initialize_lora_eva_weights

    lora = lora or LoraSettings()
    rank = _mean_rank(model, lora, parameters)
    config = LoraConfig(
        r=rank,
        lora_alpha=lora.lora_alpha(rank),
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=_EVA_RHO, adjust_scaling_factors=lora.alpha is None),
        target_modules=list(read_layers(model, lora.targets, "layer").modules),
        lora_dropout=lora.dropout,
        task_type="CAUSAL_LM",
    )
    (rows,) = batches(len(data), replace(training, steps=1, batch_size=_EVA_EXAMPLES, epochs=None), seed)
    with detached(model):
        with fixed_rng(seed):
            adapted = adapted_model(model, config, low_cpu_mem_usage=True)
            components = _eva_components(adapted, data.batch(rows), rank, parameters)
            initialize_lora_eva_weights(adapted, eva_state_dict=components)
        train(adapted, data, training, seed=seed, on_step=on_step)
        yield adapted


def _eva_components(
    adapted: Any,  # noqa: ANN401
    batch: dict[str, torch.Tensor],
    rank: int,
    parameters: float,
) -> dict[str, Any]:
    """Computes EVA's initialisation: the principal components of each module's inputs that are among the best of all.

    Args:
        adapted: A PEFT model.
        batch: Model inputs, from ``Examples.batch``.
        rank: Mean rank of the modules.
        parameters: Most parameters of all components; PEFT's limit is the number of components.

    Returns:
        ``{module name: (its rank, in features)}``, for ``peft.initialize_lora_eva_weights``.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    device, n = next(adapted.parameters()).device, _EVA_RHO * rank
    inputs = {name: tensor.to(device) for name, tensor in batch.items() if name != "labels"}
    real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    found: dict[str, tuple[Any, Any]] = {}  # by module: components, and the share of the variance that each explains
    last: list[Any] = [None, None]  # the last input and its components: q, k and v have one input

    def decompose(name: str, given: torch.Tensor) -> None:
        if given is not last[0]:
            x = given[real].float()
            x -= x.mean(0)
            _, values, vectors = torch.svd_lowrank(x, q=min(2 * n, *x.shape))
            last[:] = given, (vectors.T[:n], (values.square() / x.square().sum())[:n])
        found[name] = last[1]

    layers: list[tuple[str, Any]] = [
        (k, module) for k, module in adapted.named_modules() if isinstance(module, LoraLayer)
    ]
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: decompose(name, args[0])) for name, module in layers
    ]
    was_training = adapted.training
    adapted.eval()
    try:
        with torch.inference_mode(), adapted.disable_adapter():
            adapted(**inputs, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
        adapted.train(was_training)
    explained = torch.stack([found[name][1] for name, _ in layers])
    best = explained.flatten().argsort(descending=True) // explained.shape[1]
    costs = torch.tensor([module.in_features + module.out_features for _, module in layers], device=best.device)
    best = best[costs[best].cumsum(0) <= parameters]
    ranks = torch.bincount(best, minlength=len(layers)).tolist()
    return {name: found[name][0][:r].clone() for (name, _), r in zip(layers, ranks, strict=True)}


def differentiable_weights(model: Any, targets: Sequence[str]) -> dict[int, list[Any]]:  # noqa: ANN401
    """Returns the adapted weights of each layer, which a Fisher information needs unquantised.

    Raises:
        ValueError: A weight is quantised.
    """
    weights: dict[int, list[Any]] = {}
    for name, layer in read_layers(model, targets, "layer").modules.items():
        weight = model.get_submodule(name).weight
        if not weight.is_floating_point():
            raise ValueError(f"{name} is quantised, so it has no Fisher information; load the model unquantised.")
        weights.setdefault(layer_of(layer), []).append(weight)
    return weights


def fisher_information(
    model: Any,  # noqa: ANN401
    data: Examples,
    *,
    n_examples: int = 16,
    targets: Sequence[str] = TARGETS,
) -> dict[int, float]:
    """Computes the empirical Fisher information of each layer's adapted weights: the sum of squared gradients.

    Args:
        model: The pruned model; it is not changed.
        data: Examples; the first ones are used, one at a time.
        n_examples: Number of examples (set by hand).
        targets: Names of the adapted modules.

    Returns:
        ``{layer index: mean over examples of the sum of squared gradients}``.

    Raises:
        ValueError: An adapted module is quantised.
    """
    import torch

    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    training, device = model.training, next(model.parameters()).device
    weights = differentiable_weights(model, targets)
    found = dict.fromkeys(weights, 0.0)
    try:
        model.eval()
        model.requires_grad_(False)
        for group in weights.values():
            for weight in group:
                weight.requires_grad_(True)
        n = min(n_examples, len(data))
        for row in range(n):
            batch = {name: tensor.to(device) for name, tensor in data.batch([row]).items()}
            with torch.enable_grad():
                loss = model(**batch, use_cache=False).loss
                grads = iter(torch.autograd.grad(loss, [w for group in weights.values() for w in group]))
            for layer, group in weights.items():
                found[layer] += sum(float(next(grads).float().square().sum()) for _ in group) / n
    finally:
        model.train(training)
        for parameter, flag in required.items():
            parameter.requires_grad_(flag)
    return found


def proportional_ranks(
    shares: Mapping[int, float], costs: Mapping[int, float], candidates: Sequence[int], budget: float
) -> Ranks:
    """Allocates ranks in proportion to each layer's share, within a budget.

    All shares are scaled alike and rounded to candidates; the rest of the budget raises the layers that rounding cut
    most.

    Args:
        shares: Share by layer, such as Fisher information; not negative.
        costs: Parameters per rank, by layer.
        candidates: Allowed ranks, in rising order.
        budget: Most parameters in all.

    Returns:
        The ranks; the smallest candidates if the budget allows no others.
    """
    layers = list(shares)
    worth = np.asarray([max(float(shares[layer]), 1e-30) for layer in layers])
    cost = np.asarray([costs[layer] for layer in layers])
    choices = np.asarray(candidates, dtype=np.float64)

    def wanted(log_scale: float) -> NDArray[np.float64]:
        # far beyond the largest candidate, rounding would make the distances to all candidates equal
        return np.minimum(np.exp(log_scale) * worth / worth.max(), choices[-1])

    def at(log_scale: float) -> NDArray[np.int64]:
        return np.abs(choices - wanted(log_scale)[:, None]).argmin(1)

    low, high = -30.0, 30.0 + float(np.log(worth.max() / worth.min()))
    for _ in range(80):  # bisection to double precision
        middle = (low + high) / 2
        low, high = (middle, high) if choices[at(middle)] @ cost <= budget else (low, middle)
    chosen, last = at(low), len(choices) - 1
    while True:
        rise = (choices[np.minimum(chosen + 1, last)] - choices[chosen]) * cost
        possible = np.flatnonzero((chosen < last) & (choices[chosen] @ cost + rise <= budget))
        if not len(possible):
            return Ranks(zip(layers, choices[chosen], strict=True))
        chosen[possible[(wanted(low) - choices[chosen])[possible].argmax()]] += 1
