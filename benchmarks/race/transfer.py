"""Whether a meta-learned prior helps on a family of models (an architecture and a text) that it has not seen.

    python -m benchmarks.transfer [--quick] [--families NAME ...] [--seeds 20] [--trials 25] [--folder DIR]

For each family held out, a prior is meta-learned from the collected tasks (``collect_tasks.py``) of all other families
of small models (SmolLM2-135M is a target only: what small models teach of one of real size), and an adversarial one
from the same with their scores negated. Then studies are run on a task of that family, as in ``race.py``: RankAdaptor
with either prior and with none, each once told how sensitive the loss is to the layers' adapters after the first trial
(as ``RecoveryObjective`` tells it; that costs a forward and a backward pass over the held-out data) and once searching
by the scores alone, as all others do; TPE, TPE warm-started with trials that the prior is learned from, GP and random
search. What a study found after some trials (RankAdaptor: what ``recommend`` makes of them with the study's prior;
others: the best) is recovered again with fresh seeds and scored on text that no search saw, as normalised regret: 0 is
the best that anything ended with, 1 the mean of random allocations.

For the warm start, a source's log ranks are interpolated along the relative depth onto the target's layers and
projected onto its candidates and budget (``peers.projected``). Losses are compared on the scale that is known before:
0 is the uniform configuration's, 1 the pruned model's. Of each source its 25 best and 25 random trials are taken.
MetaLearnTPE is not among the competitors: OptunaHub fetches it from GitHub, and its author's ``tpe`` on PyPI has none.

Trials needed to reach a regret are read off the mean curve over families, made monotone, along straight lines between
the checkpoints; a curve that never gets there counts as twice the trials that were run. Priors, proposals, losses and
small models are in ``--folder``: a run that was stopped goes on. Proposals of those that learn from sources belong to
these: with other sources, they search anew, but no recovery that is known is run again.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import optuna
import torch
from optuna.samplers import GPSampler, RandomSampler, TPESampler
from scipy import stats

from benchmarks.race.peers import OURS, Makers, projected
from benchmarks.race.race import best_trial, discrimination, measure, recommended, regret, search
from benchmarks.report import FOLDER, check, interval, show, write
from benchmarks.tasks.collect import TASKS, files, read_pruned_loss, read_task, specs
from benchmarks.tasks.losses import Losses, Ranks, SensitiveTask, Sensitivities, Trials
from benchmarks.tasks.recovery import load_task
from benchmarks.tasks.smollm2 import SMOLLM2, SMOLLM2_WIDE, load_smollm2
from rankadaptor_optuna import RankAdaptorSampler, RankSpace
from rankadaptor_optuna.priors.meta import MetaTask, meta_train
from rankadaptor_optuna.surrogate.grid import Array, RankGrid
from rankadaptor_optuna.surrogate.prior import Prior

FAMILIES = ("wikitext2-9x80", "wikitext2-20x48", "alpaca-7x64", "alpaca-24x32", "docs-13x48", "questions-11x64")
CHECKPOINTS = (2, 3, 5, 8, 10, 15, 25)
SHOWN = (2, 5, 10, 25)
PRIOR, NONE, ADVERSARIAL = WITH = (f"{OURS}, prior", f"{OURS}, no prior", f"{OURS}, adversarial")
TOLD = ("", ", scores alone")  # the layers' sensitivities, or not: what the names of RankAdaptors end with
WARM = "TPE, warm-started"
LEARNED = (*(who + told for told in TOLD for who in (PRIOR, ADVERSARIAL)), WARM)  # from the sources
PEERS = ("TPE", WARM, "GP", "Random")
N_BEST = N_RANDOM = 25
SMOLLM2_SEEDS = 4  # at most, as its recoveries are some twenty times as dear


class Target(SensitiveTask, Protocol):
    """A task whose loss without recovery is known."""

    pruned_loss: float


@dataclass(frozen=True)
class Source:
    """A collected task, whose first trial is the uniform configuration."""

    task: MetaTask
    pruned_loss: float

    def relative(self) -> Array:
        """Losses of its trials, (n,): 0 is the uniform configuration's, 1 the pruned model's."""
        losses: Array = -self.task.scores
        return (losses - losses[0]) / (self.pruned_loss - losses[0])


def read_sources(folder: Path = TASKS) -> list[Source]:
    """All collected tasks of small models."""
    small = [file for file in files(folder) if file.stem != SMOLLM2.name]
    return [Source(read_task(file), read_pruned_loss(file)) for file in small]


def others(sources: Sequence[Source], family: str) -> list[Source]:
    """The sources of all other families.

    Raises:
        ValueError: There are fewer than two.
    """
    found = [source for source in sources if source.task.family != family]
    if len(found) < 2:
        raise ValueError(f"a prior for {family} needs two tasks of other families, {len(found)} are collected.")
    return found


def priors_of(sources: Sequence[Source], folder: Path) -> tuple[str, dict[str, Prior | None]]:
    """What tells these sources from others, and the priors to search with, learned once and kept in the folder."""
    digest = hashlib.sha256()
    for source in sources:
        task = source.task
        digest.update(
            task.name.encode() + b"".join(a.tobytes() for a in (task.ranks, task.scores, task.grid.sensitivity))
        )
    key = digest.hexdigest()[:8]
    found: dict[str, Prior | None] = dict.fromkeys(WITH)
    for who, sign in ((PRIOR, 1), (ADVERSARIAL, -1)):
        file = folder / f"{who.rpartition(' ')[2]}-{key}.safetensors"
        if not file.exists():
            meta_train([replace(s.task, scores=sign * s.task.scores) for s in sources]).save(file)
        found[who] = Prior.load(file)
    return key, found


def mapped(ranks: Array, depth: Array, space: RankSpace) -> dict[int, int]:
    """Another task's ranks, (L,), at relative depths, (L,), on a space's layers and within its budget."""
    here = RankGrid.from_space(space).depth
    wanted = 2 ** np.interp(here, depth, np.log2(1 + ranks)) - 1  # on the scale of ``projected``: a rank may be 0
    return projected(space, dict(zip(space.layers, wanted.tolist(), strict=True)))


def source_trials(
    sources: Sequence[Source], space: RankSpace, uniform: float, pruned: float
) -> list[tuple[Ranks, float]]:
    """Trials of other tasks as the target's: its configurations, and what they would lose on its scale.

    Args:
        sources: The other tasks.
        space: The target's.
        uniform: The target's loss with uniform ranks.
        pruned: The target's loss without recovery.
    """
    found: list[tuple[Ranks, float]] = []
    for i, source in enumerate(sources):
        relative = source.relative()
        best, rest = np.split(np.argsort(relative, kind="stable"), [N_BEST])
        chosen = [*best, *np.random.default_rng([13, i]).permutation(rest)[:N_RANDOM]]
        grid = source.task.grid
        found += [
            (mapped(source.task.ranks[row], grid.depth, space), uniform + float(relative[row]) * (pruned - uniform))
            for row in chosen
        ]
    return found


def makers_of(priors: Mapping[str, Prior | None]) -> Makers:
    """The competitors: RankAdaptors by their priors, and the others."""

    def ours(prior: Prior | None) -> Any:  # noqa: ANN401
        return lambda space, seed: RankAdaptorSampler(space, prior=prior, seed=seed)

    return {
        **{who: ours(prior) for who, prior in priors.items()},
        **dict.fromkeys(("TPE", WARM), lambda _, seed: TPESampler(seed=seed)),
        "GP": lambda _, seed: GPSampler(seed=seed),
        "Random": lambda _, seed: RandomSampler(seed=seed),
    }


def transfer(
    family: str,
    task: Target,
    sources: Sequence[Source],
    folder: Path,
    n_trials: int,
    seeds: int,
    name: str | None = None,
    learned: Path | None = None,
) -> dict[str, Any]:
    """All competitors on a task of a family held out: see ``race.measure``.

    Args:
        family: The family.
        task: Its task.
        sources: Of all families; the priors are learned from those of others.
        folder: Keeps losses and trials.
        n_trials: Of a search.
        seeds: Searches of each competitor.
        name: The task's. Default: the family's.
        learned: Keeps the priors. Default: the folder.
    """
    space, learned_from, name = task.space, others(sources, family), name or family
    key, learned_priors = priors_of(learned_from, learned or folder)
    priors = {who + told: prior for told in TOLD for who, prior in learned_priors.items()}
    scores = Losses(task, folder / f"{name}.csv")
    sensitivities = Sensitivities(task, folder / f"{name}.sensitivities.csv")
    told = {(who, seed): sensitivities(seed) for who in WITH for seed in range(seeds)}
    uniform = scores([(space.uniform(), seed) for seed in range(seeds)])  # every study's first trial
    warm = {(WARM, seed): source_trials(learned_from, space, uniform[seed], task.pruned_loss) for seed in range(seeds)}
    makers, studies = makers_of(priors), {}
    for file, who in ((name, [who for who in makers if who not in LEARNED]), (f"{name}-{key}", LEARNED)):
        known = Trials(folder / f"{file}.trials.csv")
        some = {each: makers[each] for each in who}
        studies |= search(name, space, scores, known, n_trials, seeds, makers=some, sources=warm, sensitivities=told)
    chosen: dict[tuple[str, int, int], Ranks] = {}
    for who, seed in ((who, seed) for who in makers for seed in range(seeds)):
        for n in (n for n in CHECKPOINTS if n <= n_trials):
            if who in priors:
                chosen[who, n, seed] = recommended(who, studies[who, seed], space, n, priors[who]).ranks
            else:
                chosen[who, n, seed] = best_trial(who, studies[who, seed], space, n)
    return {**measure(name, task, scores, chosen), "learned from": [source.task.name for source in learned_from]}


def needed(curve: Mapping[int, float], goal: float) -> float:
    """Trials after which a curve of regret by trials reaches a goal: see the module."""
    trials, lowest = list(curve), np.minimum.accumulate(list(curve.values()))
    if lowest[-1] > goal:
        return 2.0 * trials[-1]
    i = int((lowest <= goal).argmax())
    if i == 0:
        return float(trials[0])
    share = (lowest[i - 1] - goal) / (lowest[i - 1] - lowest[i])
    return float(trials[i - 1] + share * (trials[i] - trials[i - 1]))


Regrets = Mapping[str, Mapping[int, Array]]  # by competitor and number of trials, (searches,) each


def regrets(found: Mapping[str, Any]) -> Regrets:
    """Normalised regrets on a task: see ``race.measure``."""
    return {who: {n: regret(found, losses) for n, losses in by.items()} for who, by in found["losses"].items()}


def differences(by_family: Mapping[str, Regrets]) -> list[dict[str, Any]]:
    """Differences of regrets, paired by search, with the 95% interval that is due to the searches of these families."""
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
    """Those shown, and the two that the goals are about."""
    checkpoints = list(next(iter(next(iter(by_family.values())).values())))
    middle, final = (10, 25) if checkpoints[-1] >= 25 else (checkpoints[0], checkpoints[-1])
    return [n for n in SHOWN if n in checkpoints], middle, final


def summarise(by_family: Mapping[str, Regrets]) -> tuple[list[dict[str, Any]], dict[str, Any], str]:
    """The table's rows, the checks, and where the prior does not help."""
    first = next(iter(by_family.values()))
    checkpoints = list(next(iter(first.values())))
    shown, middle, final = _checkpoints(by_family)
    means = {
        who: {n: np.asarray([by[who][n].mean() for by in by_family.values()]) for n in checkpoints} for who in first
    }
    rows: list[dict[str, Any]] = []
    for family, by in {**by_family, "all": means}.items():  # of all, a value a family, not a seed
        for who in by:
            row: dict[str, Any] = {"family": family, "who": who}
            for n in shown:
                mean, half = interval(by[who][n].tolist())
                row[f"regret@{n}"] = f"{mean:.3f}" if np.isnan(half) else f"{mean:.3f} ±{half:.3f}"
                if who.startswith(PRIOR) and n <= middle:
                    difference = by[who][n] - by[who.replace(PRIOR, NONE)][n]
                    if len(difference) > 1 and np.ptp(difference) > 0:
                        row[f"p to none@{n}"] = f"{stats.ttest_1samp(difference, 0).pvalue:.3f}"
            rows.append(row)
    curves = {who: {n: float(values.mean()) for n, values in by.items()} for who, by in means.items()}
    best = min(PEERS, key=lambda peer: curves[peer][final])
    checks, where = {}, []
    for told in TOLD:
        prior, none, adversarial = (curves[who + told] for who in WITH)
        # no ratio, as a peer that ends with the best has a regret of 0
        name = f"regret with the prior{told} at {middle} trials - that of the best peer ({best}) at {final}"
        checks[name] = check(prior[middle] - curves[best][final], "<= 0")
        for goal_of, goal in ((f"of the best peer ({best})", curves[best][final]), ("without any", none[final])):
            name = f"trials with the adversarial prior / without any{told}, to the regret {goal_of} at {final}"
            checks[name] = check(needed(adversarial, goal) / needed(none, goal), "<= 1.2")
        gains = {f: by[NONE + told][middle].mean() - by[PRIOR + told][middle].mean() for f, by in by_family.items()}
        unhelped = ", ".join(f for f, gain in gains.items() if gain <= 0) or "none of these families"
        where.append(f"After {middle} trials the prior{told} does not help on: {unhelped}.")
    return rows, checks, "\n".join(where)


def open_target(family: str, folder: Path) -> Target:
    """The task of a family that is raced on."""
    if family == SMOLLM2.family:
        return load_smollm2(SMOLLM2_WIDE)
    return load_task(next(s for s in specs() if s.family == family and s.damage.kind == "taylor"), kept=folder)


def main() -> None:
    """Runs what is missing and writes results/transfer.json, or transfer_part.json for a part of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--quick", action="store_true", help="two seeds, 10 trials, the first family")
    parser.add_argument("--families", nargs="+", metavar="NAME", help="families to hold out, one after the other")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--trials", type=int, default=CHECKPOINTS[-1])
    parser.add_argument("--folder", type=Path, default=FOLDER / "transfer", help="priors, trials, losses and models")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.trials = 2, 10
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)  # tensors this small lose more by threads than they gain
    args.folder.mkdir(parents=True, exist_ok=True)
    known = [*dict.fromkeys(spec.family for spec in specs()), SMOLLM2.family]
    if unknown := set(args.families or ()) - set(known):
        parser.error(f"no family named {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    families = args.families or ([FAMILIES[0]] if args.quick else [*FAMILIES, SMOLLM2.family])
    sources, found, start = read_sources(), [], time.process_time()
    for family in families:
        seeds = min(args.seeds, SMOLLM2_SEEDS) if family == SMOLLM2.family else args.seeds
        found.append(transfer(family, open_target(family, args.folder), sources, args.folder, args.trials, seeds))
    show([discrimination(one) for one in found])
    by_family = {one["task"]: regrets(one) for one in found}
    rows, checks, where = summarise(by_family)
    paired = differences(by_family)
    show(rows)
    show(paired)
    print(where)
    write(
        "transfer_part" if args.quick or args.families else "transfer",
        rows,
        checks,
        seeds={"searches": args.seeds, SMOLLM2.family: min(args.seeds, SMOLLM2_SEEDS), "meta-training": 0},
        where=where,
        differences=paired,
        cpu_seconds_of_this_run=round(time.process_time() - start),
        found=found,
    )


if __name__ == "__main__":
    main()
