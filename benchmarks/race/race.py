"""Which sampler finds better ranks, on real recoveries of small LLaMAs: RankAdaptor against Optuna's samplers.

    python -m benchmarks.race [--quick] [--seeds 10] [--trials 50] [--folder DIR] [TASK ...]

Each sampler searches each task with each seed, without any prior. Every study starts from the uniform configuration,
and every trial is within the same budget. RankAdaptor is told how sensitive the loss is to the layers' adapters after
that, as ``RecoveryObjective`` tells it (a forward and a backward pass over the held-out data); once more it searches by
the scores alone, as all others do. What a study found after 10, 25 and 50 trials (its best trial, and what
``recommend`` makes of its trials) is recovered again with fresh seeds and scored on text that no search saw.

Normalised regret (as in HPO-B): 0 is the best configuration that anything ended with on that task, 1 the mean of
random allocations that use the budget. The lowest of hundreds of noisy losses is lower than it would be again, so
which is best is decided on seeds of its own; what it is worth, on those that all are scored on.

What the samplers proposed, the losses and the pruned models are in ``--folder``: a run that was stopped goes on, more
seeds or trials add to what is there, and two processes may take different tasks. What the results rest on comes with
this file, so that the table can be made again without a recovery on any machine. Where a sampler has changed, take its
lines out of ``TASK.trials.csv``, and it alone searches anew. ``--studies`` writes the studies to an SQLite file, to be
browsed. All of it anew, in another ``--folder``, takes about 4 CPU hours, two thirds of that with ``--compile``.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.storages import BaseStorage, RDBStorage
from optuna.study import Study
from scipy import stats

from benchmarks.race.peers import ALONE, OURS, SOURCE_ATTR, STATEFUL, Makers, open_study, ranks_of, sampler_of, samplers
from benchmarks.report import FOLDER, check, interval, show, write
from benchmarks.tasks.losses import Losses, Ranks, Sensitivities, Task, Trials
from benchmarks.tasks.recovery import DEVELOPMENT, TEST, load_task, random_ranks
from benchmarks.tasks.synthetic import SYNTHETIC, Synthetic
from rankadaptor_optuna import RankSpace, recommend
from rankadaptor_optuna.attributes import SENSITIVITY_ATTR
from rankadaptor_optuna.studies.recommendation import Recommendation
from rankadaptor_optuna.surrogate.grid import Array
from rankadaptor_optuna.surrogate.prior import Prior

CHECKPOINTS = (10, 25, 50)
FRESH = (101, 102, 103)
AGAIN = ((201, 202, 203), (301, 302, 303, 304, 305, 306))  # to choose the best: of all that was found, then of a few
N_FEW = 10
UNIFORM = (2, 4, 6, 8, 10, 12, 16)
N_RANDOM = 20
RECOMMEND = f"{OURS}, recommend"
MODELLED = (OURS, ALONE, "Random")  # whose trials recommend is tried on: its own sampler's, and those of none

Studies = Mapping[tuple[str, int], Study]


def open_folder(folder: Path, name: str, task: Task) -> tuple[Losses, Trials]:
    """A task's losses and trials as the folder has them."""
    stem = name.replace(" ", "-").replace(",", "")
    return Losses(task, folder / f"{stem}.csv"), Trials(folder / f"{stem}.trials.csv")


def sensitivities_of(folder: Path, name: str, task: Task, seeds: int) -> dict[tuple[str, int], dict[str, float]]:
    """What RankAdaptor's studies are told, by competitor and seed; nothing of a task that cannot tell."""
    if isinstance(task, Synthetic):
        return {}
    known = Sensitivities(task, folder / f"{name}.sensitivities.csv")
    return {(OURS, seed): known(seed) for seed in range(seeds)}


def search(
    name: str,
    space: RankSpace,
    scores: Losses,
    known: Trials,
    n_trials: int,
    seeds: int,
    who: Sequence[str] | None = None,
    storage: BaseStorage | None = None,
    makers: Makers | None = None,
    sources: Mapping[tuple[str, int], Sequence[tuple[Ranks, float]]] | None = None,
    sensitivities: Mapping[tuple[str, int], Mapping[str, float]] | None = None,
) -> Studies:
    """Runs a task's studies side by side, so that trials are recovered together; those that were stopped go on.

    The seed is that of the sampler and of the recoveries: all samplers of a seed see the same losses. Other samplers
    than the race's are given as ``makers``; ``sources`` are other tasks' trials, by competitor and seed, to begin with;
    ``sensitivities`` what a study knows of its layers.
    """
    keys = [(sampler, seed) for sampler in who or makers or samplers() for seed in range(seeds)]

    def opened(who: str, seed: int) -> Study:
        so_far, study_name, source = known.of(who, seed), f"{name}/{who}/{seed}", (sources or {}).get((who, seed), ())
        if who in STATEFUL and len(so_far) < n_trials:
            so_far = []
        loss = lambda r: scores([(r, seed)])[0]  # noqa: E731
        study = open_study(who, space, seed, so_far, loss, storage, study_name, makers, source)
        study.set_user_attr(SENSITIVITY_ATTR, (sensitivities or {}).get((who, seed), {}))
        return study

    studies = {key: opened(*key) for key in keys}
    while waiting := [key for key in keys if len(finished(studies[key])) < n_trials]:
        trials = {key: studies[key].ask() for key in waiting}
        losses = scores([(ranks_of(who, space, trial), seed) for (who, seed), trial in trials.items()])
        for (key, trial), loss in zip(trials.items(), losses, strict=True):
            studies[key].tell(trial, loss)
        known.add({key: list(trial.params.values()) for key, trial in trials.items() if key[0] not in STATEFUL})
        done = sum(min(len(finished(study)), n_trials) for study in studies.values())  # more may be kept
        print(f"{name}: {done} of {len(keys) * n_trials} trials, {scores.n_computed} recoveries", file=sys.stderr)
    for who, seed in (key for key in keys if key[0] in STATEFUL and len(known.of(*key)) < n_trials):
        known.put(who, seed, [list(trial.params.values()) for trial in finished(studies[who, seed])])
    return studies


def finished(study: Study) -> list[optuna.trial.FrozenTrial]:
    """Its completed trials, but for those of other tasks; one that a stopped run left behind is not."""
    trials = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return [trial for trial in trials if SOURCE_ATTR not in trial.user_attrs]


def found_by(who: str, study: Study, space: RankSpace, n: int) -> dict[str, Ranks]:
    """What a study's first ``n`` trials lead to: the best of them, and what ``recommend`` makes of them."""
    found = {who: best_trial(who, study, space, n)}
    if who in MODELLED:
        found[f"{who}, recommend"] = recommended(who, study, space, n).ranks
    return found


def best_trial(who: str, study: Study, space: RankSpace, n: int) -> Ranks:
    """The configuration of the best of a study's first ``n`` trials."""
    best = min(finished(study)[:n], key=lambda t: float(t.values[0]))
    return ranks_of(who, space, optuna.trial.FixedTrial(best.params))


def recommended(who: str, study: Study, space: RankSpace, n: int, prior: Prior | None = None) -> Recommendation:
    """What ``recommend`` makes, with a prior, of a study's first ``n`` trials."""
    until = optuna.create_study(direction="minimize")
    until.set_user_attr(SENSITIVITY_ATTR, study.user_attrs.get(SENSITIVITY_ATTR, {}))
    for t in finished(study)[:n]:
        ranks = ranks_of(who, space, optuna.trial.FixedTrial(t.params))
        params = {space.name(layer): rank for layer, rank in ranks.items()}
        until.add_trial(optuna.trial.create_trial(params=params, distributions=space.distributions(), value=t.value))
    return recommend(until, space=space, prior=prior)


def race(
    name: str, task: Task, folder: Path, n_trials: int, seeds: int, storage: BaseStorage | None = None
) -> dict[str, Any]:
    """All samplers on one task: losses on fresh seeds by competitor and number of trials, (seeds,) each."""
    space = task.space
    scores, known = open_folder(folder, name, task)
    told = sensitivities_of(folder, name, task, seeds)
    makers = {**samplers(), ALONE: samplers()[OURS]} if told else samplers()
    studies = search(name, space, scores, known, n_trials, seeds, storage=storage, makers=makers, sensitivities=told)
    checkpoints = [n for n in CHECKPOINTS if n <= n_trials]
    chosen: dict[tuple[str, int, int], Ranks] = {
        (competitor, n, seed): ranks
        for (who, seed), study in studies.items()
        for n in checkpoints
        for competitor, ranks in found_by(who, study, space, n).items()
    }
    return measure(name, task, scores, chosen)


def measure(name: str, task: Task, scores: Losses, chosen: Mapping[tuple[str, int, int], Ranks]) -> dict[str, Any]:
    """Losses on fresh seeds of what was found, by competitor, number of trials and seed, and what to compare them with.

    Returns:
        ``losses`` by competitor and number of trials, (seeds,) each; those of the references, ``best`` and others.
    """
    space = task.space
    rng = np.random.default_rng(12345)
    uniform = next(iter(space.uniform().values()))
    references: dict[tuple[str, int], Ranks] = {
        **{("uniform", rank): dict.fromkeys(space.layers, rank) for rank in UNIFORM},
        **{("random", i): random_ranks(space, rng) for i in range(N_RANDOM)},
    }
    if isinstance(task, Synthetic):
        references = {k: r for k, r in references.items() if set(r.values()) <= set(space.candidates)}
        references["optimum", 0] = task.optimum
    everything: dict[Any, Ranks] = {**chosen, **references}
    losses = np.reshape(
        scores([(r, seed) for r in everything.values() for seed in FRESH], report=True), (-1, len(FRESH))
    )
    by_key = dict(zip(everything, losses.mean(1).tolist(), strict=True))
    last = max(n for _, n, _ in chosen)
    ends = [ranks for (_, n, _), ranks in chosen.items() if n == last]
    best = _best([*ends, *(r for k, r in references.items() if k[0] == "optimum"), space.uniform()], scores)
    by_competitor: dict[str, dict[int, list[float]]] = {}
    for who, n, seed in chosen:
        by_competitor.setdefault(who, {}).setdefault(n, []).append(by_key[who, n, seed])
    random = losses[[key[0] == "random" for key in everything]]
    between = [stats.spearmanr(*pair).statistic for pair in itertools.combinations(random.T, 2)]
    return {
        "task": name,
        "uniform": by_key["uniform", uniform],
        "random": float(random.mean()),
        "random sd": float(random.mean(1).std(ddof=1)),
        "correlation between seeds": float(np.mean(between)),
        "best": float(np.mean(scores([(best, seed) for seed in FRESH], report=True))),
        "best ranks": list(best.values()),
        "curve": {key[1]: loss for key, loss in by_key.items() if key[0] == "uniform"},
        "losses": by_competitor,
    }


def _best(found: Sequence[Ranks], scores: Losses) -> Ranks:
    """The best of some configurations, by seeds that no other figure rests on."""
    left = list({tuple(ranks.values()): ranks for ranks in found}.values())
    seeds: tuple[int, ...] = ()
    for more, n in zip(AGAIN, (N_FEW, 1), strict=True):
        seeds += more
        losses = np.reshape(scores([(ranks, seed) for ranks in left for seed in seeds], report=True), (-1, len(seeds)))
        left = [left[i] for i in losses.mean(1).argsort(kind="stable")[:n]]
    return left[0]


def regret(found: Mapping[str, Any], losses: Sequence[float] | float) -> Array:
    """Normalised regret: 0 for the best that anything found, 1 for the mean of random allocations."""
    return np.asarray((np.asarray(losses) - found["best"]) / max(found["random"] - found["best"], 1e-12))


def equivalent_rank(found: Mapping[str, Any], loss: float) -> float:
    """The uniform rank that would reach a loss, read off the measured ones on a log scale."""
    curve = -np.minimum.accumulate(list(found["curve"].values()))
    return float(2 ** np.interp(-loss, curve, np.log2(list(found["curve"]))))


def discrimination(found: Mapping[str, Any]) -> dict[str, Any]:
    """Whether a task can tell allocations apart: more rank helps, random ones differ, and do so on other seeds, too."""
    curve = {f"uniform {rank}": f"{loss:.4f}" for rank, loss in found["curve"].items()}
    names = ("random", "random sd", "correlation between seeds")
    return {"task": found["task"], **curve, **{name: f"{found[name]:.4f}" for name in names}}


def summarise(all_found: Sequence[Mapping[str, Any]], checkpoints: Sequence[int]) -> tuple[list[Any], dict[str, Any]]:
    """The table's rows and the checks."""
    final = 25 if 25 in checkpoints else checkpoints[-1]
    rows: list[dict[str, Any]] = []
    worse: list[str] = []
    means: dict[str, list[float]] = {}
    for found in all_found:
        by = {who: {n: regret(found, losses[n]) for n in checkpoints} for who, losses in found["losses"].items()}
        # one entry a sampler: for RankAdaptor what it recommends, for the others their best trial
        raced = [RECOMMEND, *(who for who in by if sampler_of(who) != OURS and "recommend" not in who)]
        places = {n: stats.rankdata([by[who][n] for who in raced], axis=0).mean(1) for n in checkpoints}
        for who in by:
            row: dict[str, Any] = {"task": found["task"], "who": who}
            for n in checkpoints:
                mean, half = interval(by[who][n].tolist())
                row[f"regret@{n}"] = f"{mean:.3f} ±{half:.3f}"
                row[f"place@{n}"] = f"{places[n][raced.index(who)]:.1f}" if who in raced else ""
            difference = by[RECOMMEND][final] - by[who][final]
            if who != RECOMMEND and difference.any():
                p = float(stats.wilcoxon(difference).pvalue)
                row[f"p@{final}"] = f"{p:.3f}"
                if p < 0.05 and difference.mean() > 0 and who in raced:
                    worse.append(f"{who} on {found['task']}")
            loss = float(np.mean(found["losses"][who][final]))
            row |= {
                "gain on uniform": f"{found['uniform'] - loss:+.4f}",
                "as rank": f"{equivalent_rank(found, loss):.1f}",
            }
            rows.append(row)
            means.setdefault(who, []).append(float(by[who][final].mean()))
        means.setdefault("uniform", []).append(float(regret(found, found["uniform"])))
        rows.append({"task": found["task"], "who": "uniform", f"regret@{final}": f"{means['uniform'][-1]:.3f}"})
    rows += [
        {"task": "all", "who": who, f"regret@{final}": f"{np.mean(m):.3f}", "tasks": len(m)} for who, m in means.items()
    ]
    peers = {who: float(np.mean(m)) for who, m in means.items() if not who.startswith(OURS) and "recommend" not in who}
    best = min((peer for peer in peers if peer != "uniform"), key=lambda peer: peers[peer])
    checks = {
        f"mean regret at {final} trials / that of the best peer ({best})": check(
            float(np.mean(means[RECOMMEND])) / peers[best], "<= 0.6"
        ),
        f"peers significantly better at {final} trials: {', '.join(worse) or 'none'}": check(len(worse), "<= 0"),
    }
    return rows, checks


def main() -> None:
    """Runs the race and writes results/race.json, and results/race_synthetic.json for the synthetic worlds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("tasks", nargs="*", metavar="TASK", help="default: all test tasks and synthetic worlds")
    parser.add_argument("--quick", action="store_true", help="two seeds, 10 trials, first task and first world")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--folder", type=Path, default=FOLDER / "race", help="trials, losses and models")
    parser.add_argument("--studies", metavar="FILE", help="also write the studies to a new SQLite file")
    parser.add_argument("--compile", action="store_true", help="compile each task's model; needs a C++ compiler")
    args = parser.parse_args()
    if args.quick:
        args.seeds, args.trials = 2, 10
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)  # tensors this small lose more by threads than they gain
    args.folder.mkdir(parents=True, exist_ok=True)
    specs = {spec.name: spec for spec in (*TEST, *DEVELOPMENT)}
    worlds = {world.name: world for world in SYNTHETIC}
    if unknown := set(args.tasks) - specs.keys() - worlds.keys():
        parser.error(f"no task named {', '.join(sorted(unknown))}; there are {', '.join([*specs, *worlds])}")
    one = 1 if args.quick else None
    names = args.tasks or [*[spec.name for spec in TEST][:one], *list(worlds)[:one]]
    checkpoints = [n for n in CHECKPOINTS if n <= args.trials]
    storage = RDBStorage(f"sqlite:///{args.studies}") if args.studies else None
    for output, chosen in (("race", specs), ("race_synthetic", worlds)):
        found, start = [], time.process_time()
        for name in [n for n in names if n in chosen]:
            task: Task = worlds.get(name) or load_task(specs[name], kept=args.folder, compiled=args.compile)
            found.append(race(name, task, args.folder, args.trials, args.seeds, storage))
        if found:
            show([discrimination(one) for one in found])
            rows, checks = summarise(found, checkpoints)
            show(rows)
            seeds = {"searches": args.seeds, "fresh": FRESH}
            cpu = round(time.process_time() - start)
            name = output if not (args.quick or args.tasks) else f"{output}_part"
            write(name, rows, checks, seeds=seeds, cpu_seconds_of_this_run=cpu, found=found)


if __name__ == "__main__":
    main()
