"""Measure whether a meta-learned prior helps on a family (an architecture and a text) that it has not seen.

    python -m benchmarks.transfer [--quick] [--families NAME ...] [--seeds 20] [--trials 25] [--folder DIR]

For each family held out, a prior is meta-learned from the collected tasks of all other families of small models
(SmolLM2-135M is only a target), and an adversarial prior from the same tasks with their scores negated. Then a task of
that family is searched as in ``race.py``: by RankAdaptor with either prior and with none, each once told the layers'
sensitivities and once by the scores alone, by TPE, by TPE warm-started with trials that the prior is learned from, by
GP and by random search. Regret is that of ``race.py``, for RankAdaptor of ``recommend`` with the study's prior.

For the warm start, a source's log ranks are interpolated along the relative depth onto the target's layers and
projected onto its candidates and budget. Losses are compared on a scale that is known beforehand: 0 is the uniform
configuration's, 1 the pruned model's. Of each source its 25 best and 25 random trials are taken.

The number of trials needed to reach a regret is read off the mean curve over families, made monotone, along straight
lines between the checkpoints; a curve that never gets there counts as twice the trials that were run. ``--folder``
keeps priors, trials and losses. Trials of competitors that learn from sources belong to these: with other sources,
they search anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import stats

from benchmarks.race.peers import OURS, Maker, ours, projected, samplers
from benchmarks.race.regret import Found, discrimination, measure, regret
from benchmarks.race.search import Studies, best_trial, open_folder, recommended, search, sensitivities_of
from benchmarks.report import cell, check, command_parser, selected, set_up, show, write
from benchmarks.tasks.collect import Collected, collected, specs
from benchmarks.tasks.losses import SensitiveTask, Trials
from benchmarks.tasks.recovery import load_task
from benchmarks.tasks.smollm2 import SMOLLM2, SMOLLM2_WIDE, load_smollm2
from benchmarks.tasks.specs import TINY
from rankadaptor_optuna import RankSpace
from rankadaptor_optuna.priors.meta import meta_train
from rankadaptor_optuna.ranks import Ranks
from rankadaptor_optuna.recovery.embedded import cache_dir
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.prior import Prior

FAMILIES = ("wikitext2-9x80", "wikitext2-20x48", "alpaca-7x64", "alpaca-24x32", "docs-13x48", "questions-11x64")
CHECKPOINTS = (2, 3, 5, 8, 10, 15, 25)
SHOWN = (2, 5, 10, 25)
PRIOR, NONE, ADVERSARIAL = WITH = (f"{OURS}, prior", f"{OURS}, no prior", f"{OURS}, adversarial")
TOLD = ("", ", scores alone")  # ends of RankAdaptors' names: told the layers' sensitivities, or not
WARM = "TPE, warm-started"
LEARNED = (*(who + told for told in TOLD for who in (PRIOR, ADVERSARIAL)), WARM)  # competitors that learn from sources
PEERS = ("TPE", WARM, "GP", "Random")
N_BEST = N_RANDOM = 25
SMOLLM2_SEEDS = 4  # at most, as its recoveries take some twenty times as long

Regrets = Mapping[str, Mapping[int, Array]]  # by competitor and number of trials, (searches,) each


class Target(SensitiveTask, Protocol):
    """A task whose loss without recovery is known."""

    pruned_loss: float


def others(sources: Sequence[Collected], family: str) -> list[Collected]:
    """Returns the sources of all other families.

    Raises:
        ValueError: There are fewer than two.
    """
    found = [source for source in sources if source.task.family != family]
    if len(found) < 2:
        raise ValueError(f"a prior for {family} needs two tasks of other families, {len(found)} are collected.")
    return found


def priors_of(sources: Sequence[Collected], folder: Path) -> tuple[str, dict[str, Prior | None]]:
    """Returns a key of the sources, and the priors by competitor, learned once and kept in the folder."""
    digest = hashlib.sha256()
    for task in (source.task for source in sources):
        arrays = (task.ranks, task.scores, task.grid.sensitivity)
        digest.update(task.name.encode() + b"".join(array.tobytes() for array in arrays))
    key = digest.hexdigest()[:8]
    found: dict[str, Prior | None] = dict.fromkeys(WITH)
    for who, sign in ((PRIOR, 1), (ADVERSARIAL, -1)):
        file = folder / f"{who.rpartition(' ')[2]}-{key}.safetensors"
        if not file.exists():
            meta_train([replace(s.task, scores=sign * s.task.scores) for s in sources]).save(file)
        found[who] = Prior.load(file)
    return key, found


def mapped(ranks: Array, depth: Array, space: RankSpace) -> Ranks:
    """Maps another task's ranks, (L,), at relative depths, (L,), onto a space's layers and budget."""
    here = RankGrid.from_space(space).depth
    wanted = 2 ** np.interp(here, depth, np.log2(1 + ranks)) - 1  # on the scale of ``projected``: a rank may be 0
    return projected(space, dict(zip(space.layers, wanted.tolist(), strict=True)))


def source_trials(
    sources: Sequence[Collected], space: RankSpace, uniform: float, pruned: float
) -> list[tuple[Ranks, float]]:
    """Translates trials of other tasks into configurations and losses of the target.

    Args:
        sources: The other tasks.
        space: The target's.
        uniform: The target's loss with uniform ranks.
        pruned: The target's loss without recovery.
    """
    found: list[tuple[Ranks, float]] = []
    for i, source in enumerate(sources):
        relative, task = source.relative, source.task
        best, rest = np.split(np.argsort(relative, kind="stable"), [N_BEST])
        chosen = [*best, *np.random.default_rng([13, i]).permutation(rest)[:N_RANDOM]]
        found += [
            (mapped(task.ranks[row], task.grid.depth, space), uniform + float(relative[row]) * (pruned - uniform))
            for row in chosen
        ]
    return found


def transfer(family: str, task: Target, sources: Sequence[Collected], folder: Path, n_trials: int, seeds: int) -> Found:
    """Runs all competitors on a task of a family held out; returns the losses on fresh seeds, see ``measure``.

    Args:
        family: The family; the priors are learned from the sources of others.
        task: Its task.
        sources: Collected tasks of all families.
        folder: Keeps priors, losses and trials.
        n_trials: Number of trials of a search.
        seeds: Number of searches of each competitor.
    """
    space, learned_from = task.space, others(sources, family)
    losses, known = open_folder(folder, family, task)
    key, priors = priors_of(learned_from, folder)
    by_name = {who + told: prior for told in TOLD for who, prior in priors.items()}
    makers: dict[str, Maker] = {who: ours(prior) for who, prior in by_name.items()}
    makers |= {who: samplers()[who.partition(",")[0]] for who in PEERS}
    told = sensitivities_of(folder, family, task, seeds, WITH)
    uniform = losses([(space.uniform(), seed) for seed in range(seeds)])  # every study's first trial
    warm = {(WARM, seed): source_trials(learned_from, space, uniform[seed], task.pruned_loss) for seed in range(seeds)}
    studies: dict[tuple[str, int], Any] = {}
    learned = {who: makers[who] for who in LEARNED}
    alone = {who: make for who, make in makers.items() if who not in LEARNED}
    for trials, some in ((known, alone), (Trials(folder / f"{family}-{key}.trials.csv"), learned)):
        studies |= search(space, losses, trials, n_trials, seeds, some, sources=warm, sensitivities=told)
    return measure(family, task, losses, _chosen(studies, space, n_trials, by_name))


def _chosen(
    studies: Studies, space: RankSpace, n_trials: int, priors: Mapping[str, Prior | None]
) -> dict[tuple[str, int, int], Ranks]:
    chosen: dict[tuple[str, int, int], Ranks] = {}
    for (who, seed), study in studies.items():
        for n in [n for n in CHECKPOINTS if n <= n_trials]:
            if who in priors:
                chosen[who, n, seed] = recommended(who, study, space, n, priors[who]).ranks
            else:
                chosen[who, n, seed] = best_trial(who, study, space, n)
    return chosen


def needed(curve: Mapping[int, float], goal: float) -> float:
    """Returns the number of trials after which a curve of regret by trials reaches a goal; see the module."""
    trials, lowest = list(curve), np.minimum.accumulate(list(curve.values()))
    if lowest[-1] > goal:
        return 2.0 * trials[-1]
    i = int((lowest <= goal).argmax())
    if i == 0:
        return float(trials[0])
    share = (lowest[i - 1] - goal) / (lowest[i - 1] - lowest[i])
    return float(trials[i - 1] + share * (trials[i] - trials[i - 1]))


def regrets(found: Found) -> Regrets:
    """Returns the normalised regrets on a task by competitor and number of trials."""
    return {who: {n: regret(found, losses) for n, losses in by.items()} for who, by in found["losses"].items()}


def differences(by_family: Mapping[str, Regrets]) -> list[dict[str, Any]]:
    """Returns differences of regrets, paired by search.

    The 95% interval is that of other searches of the same families.
    """
    shown, middle, final = _checkpoints(by_family)
    wanted = [
        one
        for told in TOLD
        for one in (
            *((who + told, n, NONE + told, n) for who in (PRIOR, ADVERSARIAL) for n in shown),
            *((PRIOR + told, middle, peer, final) for peer in PEERS),
        )
    ]
    rows = []
    for who, n, other, m in wanted:
        apart = [by[who][n] - by[other][m] for by in by_family.values()]
        errors = [stats.sem(values) if len(values) > 1 else np.nan for values in apart]
        half = 1.96 * np.linalg.norm(errors) / len(apart)
        mean = np.mean([values.mean() for values in apart])
        spread = "" if np.isnan(half) else f" ±{half:.3f}"  # one search has none
        rows.append({"regret": f"{who} @{n}", "less that of": f"{other} @{m}", "is": f"{mean:+.3f}{spread}"})
    return rows


def _checkpoints(by_family: Mapping[str, Regrets]) -> tuple[list[int], int, int]:
    """Returns the numbers of trials that are shown, and the two that the goals are about."""
    checkpoints = list(next(iter(next(iter(by_family.values())).values())))
    middle, final = (10, 25) if checkpoints[-1] >= 25 else (checkpoints[0], checkpoints[-1])
    return [n for n in SHOWN if n in checkpoints], middle, final


def summarise(by_family: Mapping[str, Regrets]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Returns the table's rows and the checks."""
    first = next(iter(by_family.values()))
    checkpoints = list(next(iter(first.values())))
    shown, middle, final = _checkpoints(by_family)
    means = {
        who: {n: np.asarray([by[who][n].mean() for by in by_family.values()]) for n in checkpoints} for who in first
    }
    rows: list[dict[str, Any]] = []
    for family, by in {**by_family, "all": means}.items():  # "all" has a value per family, not per seed
        for who in by:
            row: dict[str, Any] = {"family": family, "who": who}
            for n in shown:
                row[f"regret@{n}"] = cell(by[who][n].tolist())
                if who.startswith(PRIOR) and n <= middle:
                    difference = by[who][n] - by[who.replace(PRIOR, NONE)][n]
                    if len(difference) > 1 and np.ptp(difference) > 0:
                        row[f"p to none@{n}"] = f"{stats.ttest_1samp(difference, 0).pvalue:.3f}"
            rows.append(row)
    curves = {who: {n: float(values.mean()) for n, values in by.items()} for who, by in means.items()}
    best = min(PEERS, key=lambda peer: curves[peer][final])
    checks = {}
    for told in TOLD:
        prior, none, adversarial = (curves[who + told] for who in WITH)
        # no ratio, as a peer that ends with the best has a regret of 0
        name = f"regret with the prior{told} at {middle} trials - that of the best peer ({best}) at {final}"
        checks[name] = check(prior[middle] - curves[best][final], "<= 0")
        for goal_of, goal in ((f"of the best peer ({best})", curves[best][final]), ("without any", none[final])):
            name = f"trials with the adversarial prior / without any{told}, to the regret {goal_of} at {final}"
            checks[name] = check(needed(adversarial, goal) / needed(none, goal), "<= 1.2")
    return rows, checks


def open_target(family: str) -> Target:
    """Opens the task of a family that is searched."""
    if family == SMOLLM2.family:
        return load_smollm2(SMOLLM2_WIDE)
    if family == TINY.family:
        return load_task(TINY)
    return load_task(next(s for s in specs() if s.family == family and s.damage.kind == "taylor"))


def main() -> None:
    """Runs what is missing and writes results/transfer.json."""
    parser = command_parser(__doc__, "two seeds, 10 trials, a tiny task, few tasks to learn from")
    parser.add_argument("--families", nargs="+", default=[], metavar="NAME", help="default: the README's seven")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=CHECKPOINTS[-1])
    parser.add_argument("--folder", type=Path, default=cache_dir() / "transfer", help="priors, trials and losses")
    args = parser.parse_args()
    set_up()
    known = [*dict.fromkeys(spec.family for spec in specs()), SMOLLM2.family, TINY.family]
    families = selected(parser, "family", args.families, known) or [*FAMILIES, SMOLLM2.family]
    if args.quick:
        args.seeds, args.trials, families = 2, 10, args.families or [TINY.family]
    sources = [source for source in collected() if source.task.family != SMOLLM2.family][: 4 if args.quick else None]
    found = []
    for family in families:
        seeds = min(args.seeds, SMOLLM2_SEEDS) if family == SMOLLM2.family else args.seeds
        found.append(transfer(family, open_target(family), sources, args.folder, args.trials, seeds))
    show([discrimination(one) for one in found])
    by_family = {one["task"]: regrets(one) for one in found}
    rows, checks = summarise(by_family)
    paired = differences(by_family)
    show(rows)
    show(paired)
    seeds_used = {"searches": args.seeds, SMOLLM2.family: min(args.seeds, SMOLLM2_SEEDS), "meta-training": 0}
    part = args.quick or bool(args.families)
    write("transfer", rows, checks, seeds=seeds_used, part=part, differences=paired)
