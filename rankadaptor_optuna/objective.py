"""RecoveryObjective: one trial = ranks in, score out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from optuna.trial import Trial

from rankadaptor_optuna.history import verification_seed
from rankadaptor_optuna.recovery.data import token_blocks
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.lora import ALPHA_RATIO, TARGETS, attached, lora_config
from rankadaptor_optuna.recovery.train import TrainingConfig, train
from rankadaptor_optuna.space import RankSpace


class RecoveryObjective:
    """Recovers a pruned model with the trial's ranks and scores it by its loss on held-out text.

    The model is loaded once and reused: each trial attaches an adapter, trains it and takes it off again. Every trial
    sees the same data in the same order and the same (nested) initialisation, so that scores differ by the ranks
    alone. Lower is better: create the study with ``direction="minimize"``.

    A trial that fails (loss not finite, out of memory) becomes a FAIL trial with its reason in the user attribute
    ``fail_reason``, and the study goes on.

    Args:
        model: The pruned model, or anything with such a ``.model``. Its weights are not changed.
        tokenizer: Its tokenizer.
        space: The rank space.
        train: Texts to train on.
        validation: Texts to score on.
        training: Settings of the training loop.
        block_length: Tokens per block.
        validation_blocks: Blocks to score on, at most.
        targets: Names of the adapted modules.
        alpha_ratio: LoRA's alpha as a multiple of the rank.
        seed: Seed of data order and initialisation, common to all trials but those that verify, which bring their own.
        on_step: Called with (step, loss) during training.

    Raises:
        ValueError: A text is too short for one block.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401
        tokenizer: Any,  # noqa: ANN401
        space: RankSpace,
        *,
        train: Sequence[str],
        validation: Sequence[str],
        training: TrainingConfig | None = None,
        block_length: int = 256,
        validation_blocks: int = 12,
        targets: Sequence[str] = TARGETS,
        alpha_ratio: float = ALPHA_RATIO,
        seed: int = 0,
        on_step: Callable[[int, float], None] | None = None,
    ) -> None:
        self.model = model if hasattr(model, "named_modules") else model.model
        self.tokenizer = tokenizer
        self.space = space
        self.training = training or TrainingConfig()
        self.seed = seed
        self.on_step = on_step
        self._targets = tuple(targets)
        self._alpha_ratio = alpha_ratio
        self._train_blocks = token_blocks(tokenizer, train, block_length)
        self._validation_blocks = token_blocks(tokenizer, validation, block_length, limit=validation_blocks)

    @contextmanager
    def recovered(self, ranks: Mapping[Any, int], *, seed: int | None = None) -> Iterator[Any]:
        """The model recovered with ``ranks`` (of the searched layers), as a context: the adapter is gone after it.

        Args:
            ranks: As the space's ``suggest`` returns them.
            seed: Another seed of data order and initialisation than the study's.

        Raises:
            ValueError: A searched layer, or sublayer, has no rank.
            FloatingPointError: The loss is not finite.
        """
        seed = self.seed if seed is None else seed
        adapted = self.space.with_fixed(ranks)
        if not any(adapted.values()):  # nothing to train: the pruned model as it is
            yield self.model
            return
        config = lora_config(adapted, targets=self._targets, alpha_ratio=self._alpha_ratio)
        with attached(self.model, config, seed=seed) as model:
            train(model, self._train_blocks, self.training, seed=seed, on_step=self.on_step)
            yield model

    def __call__(self, trial: Trial) -> float:
        """Held-out loss in nats per token; NaN, which Optuna records as FAIL, where the recovery failed."""
        ranks = self.space.suggest(trial)
        trial.set_user_attr("trainable_parameters", int(self.space.cost(ranks)))
        start = time.perf_counter()
        try:
            with self.recovered(ranks, seed=verification_seed(trial)) as model:
                loss = float(block_losses(model, self._validation_blocks).mean())
        except (RuntimeError, FloatingPointError, MemoryError) as error:  # out of memory is torch's RuntimeError
            trial.set_user_attr("fail_reason", f"{type(error).__name__}: {error}"[:500])
            return float("nan")
        trial.set_user_attr("seconds", round(time.perf_counter() - start, 2))
        return loss
