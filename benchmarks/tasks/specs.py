"""Definitions of the byte-level recovery tasks: model, pruning, recovery and rank space."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from rankadaptor_optuna.recovery.train import TrainingConfig

_PRETRAINING = TrainingConfig(steps=1500, batch_size=32, learning_rate=3e-3)
DAMAGES = ("taylor", "rough", "even")
# settings of a recovery that ``RecoveryTask`` implements
IMPLEMENTED = ("steps", "batch_size", "learning_rate", "warmup", "weight_decay", "max_grad_norm", "linear_decay")


@dataclass(frozen=True)
class Dense:
    """A model before pruning: its text, its shape and its training."""

    text: str
    n_layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    training: TrainingConfig = _PRETRAINING
    seed: int = 0


@dataclass(frozen=True)
class Damage:
    """How the model is pruned.

    Attributes:
        kind: "taylor": LLM-Pruner's global ranking, uneven but smooth along the depth. "rough": half of the layers,
            drawn at random, lose ``ratio`` of their heads and channels. "even": every layer loses ``ratio``.
        ratio: With "taylor" the share of all block parameters.
        seed: Seed of the calibration samples and of the choice of layers.
        keep_first: Number of layers at the start that stay whole.
        keep_last: Number of layers at the end that stay whole.

    Raises:
        ValueError: The kind is unknown.
    """

    kind: str
    ratio: float
    seed: int = 0
    keep_first: int = 0
    keep_last: int = 0

    def __post_init__(self) -> None:
        if self.kind not in DAMAGES:
            raise ValueError(f"recovery tasks do not implement kind={self.kind!r}; use one of {', '.join(DAMAGES)}.")


@dataclass(frozen=True)
class TaskSpec:
    """All settings of a task.

    Raises:
        ValueError: The recovery has a setting that the tasks do not implement.
    """

    name: str
    dense: Dense
    damage: Damage
    recovery: TrainingConfig
    candidates: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    budget: str = "uniform:8"
    unpruned_rank: int | None = None

    def __post_init__(self) -> None:
        for name, value in settings(self.recovery).items():
            if name not in IMPLEMENTED:
                raise ValueError(f"recovery tasks do not implement {name}={value!r}; leave it at its default.")

    @property
    def family(self) -> str:
        """Name of the architecture and text: tasks of one family share the dense model."""
        return f"{self.dense.text}-{self.dense.n_layers}x{self.dense.hidden}"


def settings(spec: Any) -> dict[str, Any]:  # noqa: ANN401
    """Returns the settings of a dataclass that differ from their defaults, as JSON has them.

    A setting that is added later leaves the settings of earlier tasks, and so their identity, as they are.
    """
    found: dict[str, Any] = {}
    for field in fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, Dense | Damage | TrainingConfig):
            found[field.name] = settings(value)
        elif value != field.default:
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


_SHORTER = replace(_PRETRAINING, steps=1000)
_WIKI_10 = Dense("wikitext2", 10, 64, heads=4, kv_heads=4, intermediate=160, seed=1)
_ALPACA_8 = Dense("alpaca", 8, 64, heads=4, kv_heads=2, intermediate=160, training=_SHORTER, seed=2)
_WIKI_12 = Dense("wikitext2", 12, 64, heads=4, kv_heads=4, intermediate=160, training=_SHORTER, seed=3)
_ALPACA_10 = Dense("alpaca", 10, 80, heads=4, kv_heads=2, intermediate=192, training=_SHORTER, seed=4)
_DOCS_16 = Dense("docs", 16, 48, heads=3, kv_heads=3, intermediate=128, training=_SHORTER, seed=5)
_COARSE = (0, 4, 8, 16, 32)
_RECOVERY = TrainingConfig(steps=24, batch_size=8, learning_rate=1.5e-3)
_GENTLE = replace(_RECOVERY, learning_rate=1e-3)

# for --quick and tests: made in seconds, from the text that every CPython ships
_DOCS_4 = Dense("docs", 4, 32, heads=4, kv_heads=2, intermediate=48, training=TrainingConfig(100, 8, 3e-3))
TINY = TaskSpec("tiny", _DOCS_4, Damage("taylor", 0.4), TrainingConfig(5, 2, 1e-2))
DEVELOPMENT: tuple[TaskSpec, ...] = (
    TaskSpec("dev-wikitext-taylor", _WIKI_10, Damage("taylor", 0.65, seed=1), _GENTLE),
    TaskSpec("dev-wikitext-rough", _WIKI_10, Damage("rough", 0.8, seed=1), TrainingConfig(24, 8, 2e-3)),
    TaskSpec("dev-alpaca-coarse", _ALPACA_8, Damage("taylor", 0.6, seed=2), _GENTLE, _COARSE),
)
TEST: tuple[TaskSpec, ...] = (
    TaskSpec("wikitext-taylor", _WIKI_12, Damage("taylor", 0.78, seed=3), _RECOVERY),
    TaskSpec("alpaca-coarse", _ALPACA_10, Damage("taylor", 0.6, 4, 1, 1), _RECOVERY, _COARSE, unpruned_rank=8),
    TaskSpec("docs-taylor", _DOCS_16, Damage("taylor", 0.55, seed=5), TrainingConfig(20, 12, 1e-3)),
    TaskSpec("docs-rough", _DOCS_16, Damage("rough", 0.9, seed=8, keep_first=2), TrainingConfig(20, 8, 3e-3)),
    TaskSpec("wikitext-even", _WIKI_12, Damage("even", 0.5, seed=3), _RECOVERY),
)
