"""Byte-level LLaMAs, trained and pruned once and kept in a cache folder."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tasks.specs import Damage, Dense, TaskSpec, settings
from benchmarks.tasks.texts import LENGTH, ByteTokenizer, Parts, byte_blocks, read_parts
from rankadaptor_optuna.pruning import load_pruned, prune
from rankadaptor_optuna.pruning.calibration import draw_samples
from rankadaptor_optuna.pruning.checkpoint import build_pruned, save_pruned
from rankadaptor_optuna.pruning.importance import unit_importance
from rankadaptor_optuna.pruning.structure import UNIT_TYPES, keep_units, transformer_layers
from rankadaptor_optuna.recovery.embedded import cache_dir
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.train import train

HELD_OUT = 128  # blocks per evaluation


def made(cache: Path | None, name: str, make: Callable[[Path], None]) -> Path:
    """Returns the folder of a name in the cache (default: the user's); makes it first where it is missing.

    Another process sees the whole folder or none.
    """
    cache = cache or cache_dir() / "tasks"
    target = cache / name
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            make(Path(scratch) / name)
            try:
                (Path(scratch) / name).rename(target)
            except OSError:  # another process was faster; its folder is as good
                if not target.exists():
                    raise
    return target


def dense_model(dense: Dense, cache: Path | None = None) -> tuple[Path, Parts, float]:
    """Returns the folder of a model before pruning, its text, and its held-out loss; trains it on the first call."""
    parts = read_parts(dense.text)

    def make_dense(folder: Path) -> None:
        model = _pretrained(dense, byte_blocks(parts.pretraining))
        model.save_pretrained(folder)
        loss = float(block_losses(model, byte_blocks(parts.validation, HELD_OUT), HELD_OUT).mean())
        (folder / "task.json").write_text(json.dumps({"dense": settings(dense), "loss": loss}))

    folder = made(cache, f"{dense.text}-{dense.n_layers}x{dense.hidden}-{_digest(dense)}", make_dense)
    return folder, parts, json.loads((folder / "task.json").read_text())["loss"]


def pruned_model(spec: TaskSpec, cache: Path | None = None) -> tuple[Any, Parts, float]:
    """Returns a task's pruned model, its text, and the held-out loss of the dense model."""
    from transformers import LlamaForCausalLM

    dense, parts, loss = dense_model(spec.dense, cache)

    def make_pruned(folder: Path) -> None:
        save_pruned(_damaged(LlamaForCausalLM.from_pretrained(dense), spec.damage, parts.pretraining), folder)

    folder = made(cache, f"{spec.family}-{spec.damage.kind}-{_digest(spec.dense, spec.damage)}", make_pruned)
    return load_pruned(folder, dtype=torch.float32), parts, loss


def taylor_pruned(model: Any, damage: Damage, calibration: list[str], **options: Any) -> Any:  # noqa: ANN401
    """Returns a model pruned by LLM-Pruner; ``options`` as ``prune`` takes them."""
    settings = {"n_samples": 64, "seed": damage.seed, **options}
    return prune(
        model,
        ByteTokenizer(),
        ratio=damage.ratio,
        calibration=calibration,
        sample_length=LENGTH,
        keep_first=damage.keep_first,
        keep_last=damage.keep_last,
        multiple_of=8,
        **settings,
    ).model


def _digest(*parts: Dense | Damage) -> str:
    return hashlib.sha256(json.dumps([settings(part) for part in parts]).encode()).hexdigest()[:8]


def _pretrained(dense: Dense, blocks: torch.Tensor) -> Any:  # noqa: ANN401
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=dense.hidden,
        intermediate_size=dense.intermediate,
        num_hidden_layers=dense.n_layers,
        num_attention_heads=dense.heads,
        num_key_value_heads=dense.kv_heads,
        max_position_embeddings=LENGTH,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng():
        torch.manual_seed(dense.seed)
        model: Any = LlamaForCausalLM(config)
    train(model, blocks, dense.training, seed=dense.seed)
    return model.eval()


def _damaged(model: Any, damage: Damage, calibration: list[str]) -> Any:  # noqa: ANN401
    if damage.kind == "taylor":
        return taylor_pruned(model, damage, calibration)
    layers = transformer_layers(model)
    hit = list(range(damage.keep_first, len(layers) - damage.keep_last))
    if damage.kind == "rough":
        hit = sorted(np.random.default_rng(damage.seed).permutation(hit)[: len(hit) // 2].tolist())
    samples = draw_samples(ByteTokenizer(), calibration, n_samples=64, sample_length=LENGTH, seed=damage.seed)
    importance = unit_importance(model, samples, hit)
    cut: dict[str, torch.Tensor] = {}
    for index in hit:
        for kind in UNIT_TYPES:
            units = importance[kind][index]
            kept = units.argsort(descending=True)[: max(1, round((1 - damage.ratio) * len(units)))]
            tensors = keep_units(layers[index], kind, sorted(kept.tolist()))
            cut |= {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}
    return build_pruned(model, cut, {"method": damage.kind, "ratio": damage.ratio, "profile": []})
