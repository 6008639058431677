"""Small real recovery tasks, for races between samplers that allocate LoRA ranks to layers.

Byte-level LLaMAs of 8 to 16 layers are trained on real text, pruned, and recovered with a rank per layer. Everything is
as in a large study (the package's pruning, nested initialisation, schedule), only small; several configurations
are recovered at once, eight on a CPU's thread, so that one costs under a CPU second, or 64 on a GPU where there is one.

    python -m benchmarks.recovery_tasks [--quick] [NAME ...]

prints whether each task can tell rank configurations apart. The texts WikiText-2 and Alpaca are looked for in
``$RANKADAPTOR_DATA``, by default ``../shared/data`` beside the repository.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import nn

from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.pruning import load_pruned, prune
from rankadaptor_optuna.pruning.calibration import draw_samples
from rankadaptor_optuna.pruning.checkpoint import build_pruned, save_pruned
from rankadaptor_optuna.pruning.importance import unit_importance
from rankadaptor_optuna.pruning.structure import UNIT_TYPES, keep_units, transformer_layers
from rankadaptor_optuna.ranks import ALPHA_RATIO, TARGETS
from rankadaptor_optuna.recovery.embedded import cache_dir
from rankadaptor_optuna.recovery.evaluate import block_losses
from rankadaptor_optuna.recovery.sensitivity import SCALE
from rankadaptor_optuna.recovery.train import TrainingConfig, _learning_rate, batches, train
from rankadaptor_optuna.surrogate.grid import Array
from rankadaptor_optuna.surrogate.knapsack import solve
from rankadaptor_optuna.texts import load_texts

LENGTH = 64  # bytes per block
HELD_OUT = 128  # blocks per evaluation
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOGETHER = 8 if DEVICE == "cpu" else 64  # configurations recovered at once
_PASSAGE = 2000
_PRETRAINING = TrainingConfig(steps=1500, batch_size=32, learning_rate=3e-3)


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
    """What pruning takes.

    Attributes:
        kind: "taylor": LLM-Pruner's global ranking, uneven but smooth along the depth. "rough": layers chosen at
            random lose ``ratio`` of their heads and channels, the others nothing. "even": every layer loses ``ratio``.
        ratio: "taylor": share of all block parameters.
        seed: Of the calibration samples and of the choice of layers.
        keep_first: Layers at the start that stay whole.
        keep_last: Layers at the end that stay whole.
    """

    kind: str
    ratio: float
    seed: int = 0
    keep_first: int = 0
    keep_last: int = 0


@dataclass(frozen=True)
class TaskSpec:
    """Everything that defines a task."""

    name: str
    dense: Dense
    damage: Damage
    recovery: TrainingConfig
    candidates: tuple[int, ...] = (2, 4, 6, 8, 10, 12)
    budget: str = "uniform:8"
    unpruned_rank: int | None = None

    @property
    def family(self) -> str:
        """Architecture and text: tasks of one family share the dense model."""
        return f"{self.dense.text}-{self.dense.n_layers}x{self.dense.hidden}"


_SHORTER = replace(_PRETRAINING, steps=1000)
_WIKI_10 = Dense("wikitext2", 10, 64, heads=4, kv_heads=4, intermediate=160, seed=1)
_ALPACA_8 = Dense("alpaca", 8, 64, heads=4, kv_heads=2, intermediate=160, training=_SHORTER, seed=2)
_WIKI_12 = Dense("wikitext2", 12, 64, heads=4, kv_heads=4, intermediate=160, training=_SHORTER, seed=3)
_ALPACA_10 = Dense("alpaca", 10, 80, heads=4, kv_heads=2, intermediate=192, training=_SHORTER, seed=4)
_DOCS_16 = Dense("docs", 16, 48, heads=3, kv_heads=3, intermediate=128, training=_SHORTER, seed=5)
_COARSE = (0, 4, 8, 16, 32)
_RECOVERY = TrainingConfig(steps=24, batch_size=8, learning_rate=1.5e-3)
_GENTLE = replace(_RECOVERY, learning_rate=1e-3)

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


@dataclass(frozen=True)
class Parts:
    """Disjoint passages of one text."""

    pretraining: list[str]
    recovery: list[str]
    validation: list[str]
    report: list[str]


def read_parts(text: str, data: Path | None = None) -> Parts:
    """Cuts a text ("wikitext2", "alpaca", "docs" or "questions") into disjoint parts, passage by passage.

    Raises:
        ValueError: There is no such text.
        FileNotFoundError: Its files are not in the data folder; the message says which.
    """
    if text == "docs":
        docs = load_texts()
        again = [p for i, p in enumerate(docs.train) if i % 4 == 3]
        return Parts([p for i, p in enumerate(docs.train) if i % 4 != 3], again, docs.validation, docs.report)
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = data or Path(os.environ.get("RANKADAPTOR_DATA") or default)
    if text == "wikitext2":
        lines = [line for name in ("validation.txt", "test.txt") for line in _read(folder / text / name)]
    elif text == "alpaca":
        records = [json.loads(line) for line in _read(folder / text / "train.jsonl")]
        lines = [f"{r['instruction']}\n{r['input']}\n{r['output']}\n\n" for r in records]
    elif text == "questions":
        files = [
            folder / "tasks" / name / "train.jsonl" for name in ("gsm8k", "openbookqa", "arc_easy", "arc_challenge")
        ]
        lines = [_question(json.loads(line)) for file in files for line in _read(file)]
    else:
        raise ValueError(f"no text named {text!r}; there are wikitext2, alpaca, docs and questions.")
    passages = [""]
    for line in lines:
        passages[-1] += line
        if len(passages[-1]) >= _PASSAGE:
            passages.append("")
    share = [[p for i, p in enumerate(passages) if i % 10 in tenths] for tenths in (range(6), (6, 7), (8,), (9,))]
    return Parts(*share)


def _question(record: Mapping[str, Any]) -> str:
    """A question with its answer, as text."""
    question = record.get("question") or record["question_stem"]
    answer = record.get("answer")
    if answer is None:
        choices = record["choices"]
        answer = choices["text"][choices["label"].index(record["answerKey"])]
    return f"{question}\n{answer}\n\n"


def _read(file: Path) -> list[str]:
    if not file.exists():
        raise FileNotFoundError(f"{file} is missing; set RANKADAPTOR_DATA to the folder that holds the texts.")
    return file.read_text(encoding="utf-8").splitlines(keepends=True)


def _tokenizer(text: str, **_: Any) -> dict[str, list[int]]:  # noqa: ANN401
    return {"input_ids": list(text.encode())}


def _blocks(passages: Sequence[str], limit: int | None = None) -> torch.Tensor:
    """Blocks of bytes, (n, LENGTH); with a limit, so many spread evenly over the passages."""
    stream = np.frombuffer("".join(passages).encode(), dtype=np.uint8)
    blocks = torch.from_numpy(stream[: len(stream) // LENGTH * LENGTH].astype(np.int64)).view(-1, LENGTH)
    if limit is None or len(blocks) <= limit:
        return blocks
    return blocks[torch.linspace(0, len(blocks) - 1, limit).long()]


class _Stacked(nn.Module):
    """A frozen linear below K adapters: the K equal parts of a batch belong to K configurations."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight
        self.factors: tuple[torch.Tensor, torch.Tensor] | None = None  # A (K, rank, in), B (K, out, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.factors is None:
            return nn.functional.linear(x, self.weight)
        a, b = self.factors
        merged = torch.baddbmm(self.weight, b, a, alpha=ALPHA_RATIO)  # one product for base and adapter together
        return torch.bmm(x.reshape(len(a), -1, x.shape[-1]), merged.mT).view(*x.shape[:-1], -1)


class RecoveryTask:
    """A pruned model, its rank space, and the loss after recovery.

    Args:
        spec: What the task is.
        pruned: The pruned model; the task takes it over.
        dense_loss: Loss of the model before pruning.
        parts: The texts.
        compiled: Whether torch compiles the model, with a C++ compiler: once, for over a CPU minute, after which a
            recovery takes two thirds of the time.
    """

    def __init__(
        self,
        spec: TaskSpec,
        pruned: Any,  # noqa: ANN401
        dense_loss: float,
        parts: Parts,
        *,
        compiled: bool = False,
    ) -> None:
        self.spec = spec
        self.space = RankSpace.from_model(pruned, spec.candidates, spec.budget, unpruned_rank=spec.unpruned_rank)
        pruned.to(DEVICE)
        self._train = _blocks(parts.recovery).to(DEVICE)
        self._held_out = {
            False: _blocks(parts.validation, HELD_OUT).to(DEVICE),
            True: _blocks(parts.report, HELD_OUT).to(DEVICE),
        }
        self.dense_loss = dense_loss
        self.pruned_loss = float(block_losses(pruned, self._held_out[False], HELD_OUT).mean())
        self._model = pruned.requires_grad_(False)
        self._modules: dict[tuple[int, str], _Stacked] = {}
        for index, layer in enumerate(transformer_layers(pruned)):
            for name, module in list(layer.named_modules()):
                if name.rpartition(".")[2] in TARGETS and isinstance(module, nn.Linear):
                    stacked = _Stacked(module)
                    layer.set_submodule(name, stacked)
                    self._modules[index, name] = stacked
        self._compiled = torch.compile(self._block_losses, dynamic=False) if compiled else None

    def losses(
        self, configurations: Sequence[Mapping[int, int]], seed: int | Sequence[int], *, report: bool = False
    ) -> list[float]:
        """Recovers with each configuration and measures the held-out loss.

        Args:
            configurations: ``{layer: rank}`` of the searched layers; 0 means no adapter.
            seed: Of initialisation and data order, as the package uses it; one for all or one for each.
            report: Evaluate on the part that no search may see.

        Returns:
            Nats per byte; each is what the configuration alone would give, up to rounding.
        """
        each = [seed] * len(configurations) if isinstance(seed, int) else seed
        asked = list(zip(map(self.space.with_fixed, configurations), each, strict=True))
        found: list[float] = []
        for start in range(0, len(asked), TOGETHER):
            chunk = asked[start : start + TOGETHER]
            found += self._recover(chunk, self._held_out[report])[: len(chunk)]
        return found

    def sensitivity(self, seed: int) -> dict[int, float]:
        """How sensitive the held-out loss is to each searched layer, at uniform ranks: see ``sensitivities``."""
        chunk = [(self.space.with_fixed(self.space.uniform()), seed)]
        flat, shapes = self._trained(chunk, max(chunk[0][0].values()), self._block_losses)
        factors, held_out = self._cut(flat.detach(), shapes), self._held_out[False]
        weights = [(SCALE * b).requires_grad_() for b in factors[1::2]]
        found = dict.fromkeys(self.space.layers, 0.0)
        try:
            for module, a, b in zip(self._modules.values(), factors[::2], weights, strict=True):
                module.factors = (a, b)
            for blocks in torch.split(held_out, 16):
                loss = self._block_losses(blocks, 1).sum() / len(held_out)
                gradients = torch.autograd.grad(loss, weights)
                for (layer, _), weight, gradient in zip(self._modules, weights, gradients, strict=True):
                    if layer in found:
                        found[layer] -= float((weight.detach() * gradient).sum()) / SCALE
        finally:
            self._detach()
        return found

    def _recover(self, chunk: list[tuple[dict[int, int], int]], held_out: torch.Tensor) -> list[float]:
        rank = max(1, *(r for ranks, _ in chunk for r in ranks.values()))
        block_losses, most = self._block_losses, max(self.spec.candidates)
        if self._compiled and rank <= most and len(chunk) > TOGETHER // 2:  # of one shape, not to be compiled anew
            block_losses, rank = self._compiled, most
            chunk = chunk + chunk[-1:] * (TOGETHER - len(chunk))
        flat, shapes = self._trained(chunk, rank, block_losses)
        n = len(chunk)
        try:
            with torch.inference_mode():
                self._attach(flat.detach(), shapes)
                found = [block_losses(blocks.repeat(n, 1), n) for blocks in torch.split(held_out, 16)]
                return torch.cat(found, 1).mean(1).tolist()
        finally:
            self._detach()

    def _trained(
        self, chunk: list[tuple[dict[int, int], int]], rank: int, block_losses: Callable[..., torch.Tensor]
    ) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
        """All factors of all configurations after the recovery: see ``_initial``."""
        config = self.spec.recovery
        flat, shapes = self._initial(chunk, rank)
        optimizer = torch.optim.AdamW([flat], config.learning_rate, weight_decay=config.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, config))
        try:
            for rows in zip(*(batches(len(self._train), config, seed) for _, seed in chunk), strict=True):
                self._attach(flat, shapes)
                chosen = torch.from_numpy(np.concatenate(rows)).to(DEVICE)
                loss: Any = block_losses(self._train[chosen], len(chunk)).mean(1).sum()
                loss.backward()
                assert flat.grad is not None
                norm = flat.grad.norm(dim=1, keepdim=True)  # of each configuration's own gradient
                flat.grad.mul_((config.max_grad_norm / (norm + 1e-6)).clamp(max=1))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        finally:
            self._detach()
        return flat, shapes

    def _initial(
        self, chunk: list[tuple[dict[int, int], int]], rank: int
    ) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
        """All factors of all configurations, (K, parameters), and the shapes that they are cut into.

        Rows of A beyond a configuration's rank are zero, and so are columns of B: each is a factor of the other's
        gradient, so they stay zero.
        """
        factors: list[torch.Tensor] = []
        shapes: list[tuple[int, ...]] = []
        for (layer, name), module in self._modules.items():
            n_out, n_in = module.weight.shape
            peft_name = f"base_model.model.model.layers.{layer}.{name}"
            rows = torch.empty(len(chunk), rank, n_in)
            for row, (ranks, seed) in zip(rows, chunk, strict=True):
                rng = np.random.default_rng([seed, zlib.crc32(peft_name.encode())])
                row.copy_(torch.from_numpy(rng.uniform(-(n_in**-0.5), n_in**-0.5, size=(rank, n_in))))
                row[ranks.get(layer, 0) :] = 0
            factors += [rows.flatten(1), torch.zeros(len(chunk), n_out * rank)]
            shapes += [(rank, n_in), (n_out, rank)]
        return torch.cat(factors, 1).to(DEVICE).requires_grad_(), shapes

    @staticmethod
    def _cut(flat: torch.Tensor, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
        parts = torch.split(flat, [a * b for a, b in shapes], dim=1)
        return [part.view(-1, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def _attach(self, flat: torch.Tensor, shapes: list[tuple[int, ...]]) -> None:
        factors = self._cut(flat, shapes)
        for module, a, b in zip(self._modules.values(), factors[::2], factors[1::2], strict=True):
            module.factors = (a, b)

    def _detach(self) -> None:
        for module in self._modules.values():
            module.factors = None

    def _block_losses(self, blocks: torch.Tensor, n: int) -> torch.Tensor:
        """Losses (n, blocks) of n configurations, each on its own part of the blocks."""
        logits = self._model(input_ids=blocks, use_cache=False).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.flatten(0, 1), blocks[:, 1:].flatten(), reduction="none")
        return losses.view(n, len(blocks) // n, -1).mean(2)


def dense_model(dense: Dense, cache: Path | None = None, data: Path | None = None) -> tuple[Path, Parts, float]:
    """The folder of a model before pruning, which is trained on the first call, its text, and its held-out loss."""
    parts = read_parts(dense.text, data)

    def make_dense(folder: Path) -> None:
        model = _pretrained(dense, _blocks(parts.pretraining))
        model.save_pretrained(folder)
        loss = float(block_losses(model, _blocks(parts.validation, HELD_OUT), HELD_OUT).mean())
        (folder / "task.json").write_text(json.dumps({"dense": asdict(dense), "loss": loss}))

    family = f"{dense.text}-{dense.n_layers}x{dense.hidden}"
    folder = made(cache or cache_dir() / "tasks", f"{family}-{_digest(dense)}", make_dense)
    return folder, parts, json.loads((folder / "task.json").read_text())["loss"]


def load_task(
    spec: TaskSpec,
    cache: Path | None = None,
    data: Path | None = None,
    kept: Path | None = None,
    *,
    compiled: bool = False,
) -> RecoveryTask:
    """Opens a task; its model is trained and pruned on the first call.

    Args:
        spec: The task.
        cache: Folder of the models. Default: the user's cache folder.
        data: Folder of the texts. Default: see the module.
        kept: Where the pruned model is taken from if it is there, else put, in bfloat16, so that other machines, whose
            training would round otherwise, go on with the same one.
        compiled: See ``RecoveryTask``.
    """
    if kept is None:
        pruned, parts, loss = _models(spec, cache, data)
    else:

        def keep(folder: Path) -> None:
            pruned, _, loss = _models(spec, cache, data)
            save_pruned(load_pruned(pruned, dtype=torch.bfloat16), folder)
            for name in ("modeling.py", "generation_config.json"):  # for those who open it without this package
                (folder / name).unlink(missing_ok=True)
            (folder / "task.json").write_text(json.dumps({"spec": settings(spec), "loss": loss}))

        pruned, parts = made(kept, spec.name, keep), read_parts(spec.dense.text, data)
        about = json.loads((pruned / "task.json").read_text())
        if about["spec"] != settings(spec):
            raise ValueError(f"{pruned} is the model of other settings of {spec.name}; move it away.")
        loss = about["loss"]
    return RecoveryTask(spec, load_pruned(pruned, dtype=torch.float32), loss, parts, compiled=compiled)


def load_pruned_model(spec: TaskSpec, cache: Path | None = None, data: Path | None = None) -> Any:  # noqa: ANN401
    """A task's pruned model as it is, for one recovery at a time; arguments as ``load_task``'s."""
    return load_pruned(_models(spec, cache, data)[0], dtype=torch.float32)


def _models(spec: TaskSpec, cache: Path | None, data: Path | None) -> tuple[Path, Parts, float]:
    """Folder of the pruned model, the texts, and the loss of the dense model."""
    from transformers import LlamaForCausalLM

    dense, parts, loss = dense_model(spec.dense, cache, data)

    def make_pruned(folder: Path) -> None:
        model = _pruned(LlamaForCausalLM.from_pretrained(dense), spec.damage, parts.pretraining)
        save_pruned(model, folder)
        (folder / "task.json").write_text(json.dumps({"dense": asdict(spec.dense), "damage": asdict(spec.damage)}))

    name = f"{spec.family}-{spec.damage.kind}-{_digest(spec.dense, spec.damage)}"
    return made(cache or cache_dir() / "tasks", name, make_pruned), parts, loss


def settings(spec: TaskSpec | Dense | Damage | TrainingConfig) -> dict[str, Any]:
    """What differs from the defaults, as JSON has it, so that a setting to come does not make this another task."""
    found: dict[str, Any] = {}
    for field in fields(spec):
        value = getattr(spec, field.name)
        if isinstance(value, Dense | Damage | TrainingConfig):
            found[field.name] = settings(value)
        elif value != field.default:
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found


def _digest(*parts: Dense | Damage) -> str:
    return hashlib.sha256(json.dumps([settings(part) for part in parts]).encode()).hexdigest()[:8]


def made(cache: Path, name: str, make: Callable[[Path], None]) -> Path:
    """The folder of that name, made first if it is not there; never half made."""
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


def _pruned(model: Any, damage: Damage, calibration: list[str]) -> Any:  # noqa: ANN401
    settings: dict[str, Any] = {"n_samples": 64, "sample_length": LENGTH, "seed": damage.seed}
    if damage.kind == "taylor":
        settings |= {"keep_first": damage.keep_first, "keep_last": damage.keep_last, "multiple_of": 8}
        return prune(model, _tokenizer, ratio=damage.ratio, calibration=calibration, **settings).model
    layers = transformer_layers(model)
    hit = list(range(damage.keep_first, len(layers) - damage.keep_last))
    if damage.kind == "rough":
        hit = sorted(np.random.default_rng(damage.seed).permutation(hit)[: len(hit) // 2].tolist())
    importance = unit_importance(model, draw_samples(_tokenizer, calibration, **settings), hit)
    cut: dict[str, torch.Tensor] = {}
    for index in hit:
        for kind in UNIT_TYPES:
            units = importance[kind][index]
            kept = units.argsort(descending=True)[: max(1, round((1 - damage.ratio) * len(units)))]
            tensors = keep_units(layers[index], kind, sorted(kept.tolist()))
            cut |= {f"model.layers.{index}.{name}": tensor for name, tensor in tensors.items()}
    return build_pruned(model, cut, {"method": damage.kind, "ratio": damage.ratio, "profile": []})


def random_ranks(space: RankSpace, rng: np.random.Generator) -> dict[int, int]:
    """Independent ranks, then single steps at random until the budget is met and used."""
    candidates, ranks = list(space.candidates), {i: int(rng.choice(space.candidates)) for i in space.layers}
    for step in (-1, 1):
        for layer in [i for _ in candidates for i in rng.permutation(space.layers).tolist()]:
            place = candidates.index(ranks[layer]) + step
            if 0 <= place < len(candidates) and (step > 0 or not space.is_feasible(ranks)):
                moved = {**ranks, layer: candidates[place]}
                ranks = moved if step < 0 or space.is_feasible(moved) else ranks
    return ranks


def weighted_ranks(space: RankSpace, weights: Array) -> dict[int, int]:
    """Ranks about in proportion to each layer's weight per cost: the best for a sum of weight x log rank."""
    assert space.budget is not None
    values, costs = np.asarray(space.candidates, float), np.asarray(space.costs)
    choice = solve(weights[:, None] * np.log1p(values), costs[:, None] * values, space.budget - space.fixed_cost)
    return {layer: space.candidates[i] for layer, i in zip(space.layers, choice, strict=True)}


def structured_ranks(task: RecoveryTask) -> dict[str, dict[int, int]]:
    """What a person would try: ranks that rise, fall or bulge along the depth, or follow pruning, costs or need.

    Need: how much the loss rises, with a seed of its own, when one layer alone gets the smallest rank.
    """
    space, uniform = task.space, task.space.uniform()
    depth, costs, profile = np.linspace(-1, 1, len(space.layers)), np.asarray(space.costs), np.asarray(space.profile)
    pruned = (profile - profile.mean()) / max(profile.std(), 1e-9)
    shapes = {"rising": depth, "falling": -depth, "middle": 1 - 2 * depth**2, "ends": 2 * depth**2 - 1}
    shapes |= {"more where pruned": pruned / 2, "less where pruned": -pruned / 2, "equal cost": -np.log(costs)}
    weights = {name: np.exp(shape) * costs for name, shape in shapes.items()}
    lowered = [uniform, *({**uniform, layer: space.candidates[0]} for layer in space.layers)]
    found = np.asarray(task.losses(lowered, seed=2))
    weights["by need"] = np.maximum(found[1:] - found[0], 1e-6)
    return {name: weighted_ranks(space, w) for name, w in weights.items()}


def describe(task: RecoveryTask, n_random: int = 24) -> dict[str, Any]:
    """How well a task tells rank configurations apart."""
    space, rng = task.space, np.random.default_rng(0)
    uniform = {r: dict.fromkeys(space.layers, r) for r in (2, 4, 8, 12, 16)}
    structured = structured_ranks(task)
    random = [random_ranks(space, rng) for _ in range(n_random)]
    asked = [*uniform.values(), *structured.values(), *random]
    start = time.process_time()
    first, second = (task.losses(asked, seed) for seed in (0, 1))
    seconds = (time.process_time() - start) / 2 / len(asked)
    pairs = np.asarray([first, second])[:, -n_random:]
    means = np.mean([first, second], axis=0).tolist()
    best = min(zip(means[len(uniform) : -n_random], structured, strict=True))
    return {
        "task": task.spec.name,
        "dense": task.dense_loss,
        "pruned": task.pruned_loss,
        **{f"u{r}": loss for r, loss in zip(uniform, means, strict=False)},
        "random mean": float(pairs.mean()),
        "sd": float(pairs.mean(0).std(ddof=1)),
        "noise": float((pairs[0] - pairs[1]).std(ddof=1) / 2),  # of the mean over the two seeds
        "min": float(pairs.mean(0).min()),
        "structured": best[0],
        "which": best[1],
        "rho": float(stats.spearmanr(*pairs).statistic),
        "CPU s": seconds,
    }


def main() -> None:
    """Prints one row per task."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("names", nargs="*", metavar="NAME", help="tasks; default: all")
    parser.add_argument("--quick", action="store_true", help="few random allocations")
    parser.add_argument("--cache", type=Path, help="folder of the models")
    args = parser.parse_args()
    torch.set_num_threads(1)  # tensors this small lose more by threads than they gain
    known = {spec.name: spec for spec in (*DEVELOPMENT, *TEST)}
    if unknown := set(args.names) - set(known):
        parser.error(f"no task named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    for i, name in enumerate(args.names or known):
        row = describe(load_task(known[name], args.cache), 6 if args.quick else 24)
        if i == 0:
            print("  ".join(f"{key:>{20 if key in ('task', 'which') else 7}}" for key in row))
        cells = (f"{v:>20}" if isinstance(v, str) else f"{v:>{max(7, len(k))}.4f}" for k, v in row.items())
        print("  ".join(cells), flush=True)


if __name__ == "__main__":
    main()
