"""The ``rankadaptor`` command: the options of all its commands, which is why it is long; the work is done elsewhere."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from rankadaptor_optuna import __version__


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _ranks(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected ranks like 2,4,8, got {text!r}") from None


def _joined(argv: Sequence[str]) -> list[str]:
    """Joins ``--candidates -2,4``, which argparse would take for two options, so that it is checked as ranks."""
    words = list(argv)
    for i, word in enumerate(words[:-1]):
        if word == "--candidates" and words[i + 1][:1] == "-":
            return [*words[:i], f"{word}={words[i + 1]}", *words[i + 2 :]]
    return words


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="rankadaptor", description="Finds a LoRA rank for each layer of a pruned language model.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    finished = _Parser(add_help=False)  # what is done with a study's result
    finished.add_argument("--storage", required=True, metavar="URL", help="Optuna storage")
    finished.add_argument("--study", default="search", metavar="NAME", help="study name (default: %(default)s)")
    finished.add_argument(
        "--pruned", type=Path, metavar="DIR", help="the pruned model (default: made as the recipe says)"
    )

    quick = commands.add_parser(
        "quickstart",
        help="the main job end to end on a small real model",
        description="Prunes a model, searches a LoRA rank per layer, recovers it and reports. Run it again with the "
        "same --out to go on where it stopped.",
    )
    quick.set_defaults(run=_quickstart)
    quick.add_argument("--trials", type=int, default=10, metavar="N", help="trials to reach (default: %(default)s)")
    quick.add_argument("--out", type=Path, default=Path("rankadaptor-out"), metavar="DIR", help="default: %(default)s")
    quick.add_argument("--seed", type=int, default=0, metavar="S", help="default: %(default)s")
    quick.add_argument("--model", metavar="PATH", help="model folder or Hub name (default: SmolLM2-135M-Instruct)")
    quick.add_argument(
        "--ratio",
        type=float,
        default=0.25,
        help="share of the blocks' parameters to prune (default: %(default)s)",
    )
    quick.add_argument(
        "--candidates",
        type=_ranks,
        default=(2, 4, 6, 8, 10, 12),
        metavar="R,R,...",
        help="default: 2,4,6,8,10,12",
    )
    quick.add_argument(
        "--budget", default="uniform:8", help="trainable parameters, or uniform:RANK (default: %(default)s)"
    )
    quick.add_argument(
        "--granularity",
        choices=("layer", "sublayer"),
        default="layer",
        help="one rank per layer, or one for its attention and one for its MLP (default: %(default)s)",
    )
    quick.add_argument("--steps", type=int, default=8, help="training steps of one recovery (default: %(default)s)")
    quick.add_argument("--storage", metavar="URL", help="Optuna storage (default: SQLite in --out)")
    quick.add_argument("--study", default="quickstart", metavar="NAME", help="study name (default: %(default)s)")

    look = commands.add_parser(
        "search",
        help="search ranks for your model as a recipe says",
        description="Prunes the model of a recipe (TOML), searches a LoRA rank per layer and recommends. Run it again "
        "with the same --out to go on; start it anywhere with the same --storage and --study to help.",
    )
    look.add_argument("recipe", type=Path, nargs="?", metavar="RECIPE", help="TOML file (default: the study's own)")
    look.add_argument("--trials", type=int, default=25, metavar="N", help="trials to reach (default: %(default)s)")
    look.add_argument("--out", type=Path, default=Path("rankadaptor-out"), metavar="DIR", help="default: %(default)s")
    look.add_argument("--storage", metavar="URL", help="Optuna storage (default: SQLite in --out)")
    look.add_argument("--study", default="search", metavar="NAME", help="study name (default: %(default)s)")
    look.add_argument(
        "--prior",
        default="pretrained",
        help="where the performance model starts: pretrained, none, a file, or db:NAME[@VERSION] of --storage; a study "
        "that runs already keeps its own (default: %(default)s)",
    )
    look.add_argument(
        "--on-bad-prior",
        choices=("raise", "pretrained"),
        default="raise",
        help="what a missing, corrupt or newer prior means: an error, or the shipped one (default: %(default)s)",
    )
    look.set_defaults(run=_search)

    give = commands.add_parser(
        "export",
        parents=[finished],
        help="train the recommended ranks of a study and write them for others",
        description="Trains the recommended ranks and writes a PEFT adapter, rank_pattern.json and a model card.",
    )
    give.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    give.add_argument("--steps", type=int, metavar="N", help="training steps (default: the recipe's)")
    give.add_argument("--seed", type=int, metavar="S", help="of data order and initialisation (default: the recipe's)")
    give.add_argument("--merge", action="store_true", help="write the merged model too")
    give.set_defaults(run=_export)

    versus = commands.add_parser(
        "compare",
        parents=[finished],
        help="the recommended ranks beside uniform LoRA, AdaLoRA, EVA and Fisher-proportional ranks",
        description="Recovers with each, on the same data and fresh seeds, within the same parameters, and prints a "
        "table. Run it again with the same --out to go on where it stopped.",
    )
    versus.add_argument(
        "--out", type=Path, default=Path("rankadaptor-compare"), metavar="DIR", help="default: %(default)s"
    )
    versus.add_argument("--seeds", type=int, default=3, metavar="N", help="fresh seeds (default: %(default)s)")
    versus.add_argument("--tasks", metavar="T,T,...", help="lm-eval tasks (default: the recipe's)")
    versus.add_argument("--include-path", metavar="DIR", help="folder of further lm-eval tasks (default: the recipe's)")
    versus.add_argument("--limit", type=int, metavar="N", help="items per task (default: the recipe's report_limit)")
    versus.set_defaults(run=_compare)

    cut = commands.add_parser(
        "prune",
        help="remove the least important parts of a model",
        description="Prunes a LLaMA-like model and writes a checkpoint of safetensors and JSON. Options that are not "
        "given take the method's own values.",
    )
    cut.set_defaults(run=_prune)
    cut.add_argument("model", metavar="MODEL", help="model folder or Hub name, or 'embedded': SmolLM2-135M-Instruct")
    cut.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    cut.add_argument("--method", choices=("llm-pruner", "shortened", "slimgpt"), help="default: llm-pruner")
    cut.add_argument("--ratio", type=float, metavar="R", help="share of the blocks' parameters (default: 0.25)")
    cut.add_argument(
        "--preset",
        choices=("llm-pruner",),
        help="LLM-Pruner's own: 0.25 on layers 4 to 29 of 32, each ranked apart",
    )
    cut.add_argument("--calibration", metavar="FILE", help="text, JSONL or Hub data set (default: embedded text)")
    cut.add_argument("--criterion", metavar="NAME", help="of importance, such as param_first or ppl")
    cut.add_argument("--reduction", choices=("sum", "mean", "max", "prod", "first"))
    cut.add_argument("--ranking", choices=("global", "local"))
    cut.add_argument("--structure", choices=("units", "hidden"), help="heads and MLP channels, or hidden channels")
    cut.add_argument("--steps", type=int, metavar="N", help="measure anew in so many steps")
    cut.add_argument("--keep-first", type=int, metavar="N", help="layers at the start that stay whole")
    cut.add_argument("--keep-last", type=int, metavar="N", help="layers at the end that stay whole")
    cut.add_argument("--multiple-of", type=int, metavar="N", help="of MLP widths (default: 32)")
    cut.add_argument("--n-samples", type=int, metavar="N", help="calibration windows")
    cut.add_argument("--sample-length", type=int, metavar="N", help="tokens of each")
    cut.add_argument("--seed", type=int, metavar="S", help="of the choice of windows (default: 0)")
    cut.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: the checkpoint's"
    )

    convert = commands.add_parser(
        "import-checkpoint",
        help="convert a pickled checkpoint of LLM-Pruner",
        description="Converts LLM-Pruner's pytorch_model.bin to safetensors and JSON without running anything in it.",
    )
    convert.set_defaults(run=_import)
    convert.add_argument("file", type=Path, metavar="FILE", help="pytorch_model.bin as LLM-Pruner writes it")
    convert.add_argument("out", type=Path, metavar="OUT", help="folder to create")
    convert.add_argument("--tokenizer", metavar="NAME", help="folder or Hub name (default: the one in FILE)")
    convert.add_argument("--allow-pickle", action="store_true", help="read FILE, a pickle; without it, FILE is refused")

    learn = commands.add_parser(
        "meta-train",
        help="learn a prior from the studies of a database",
        description="Learns a prior from finished studies and adds it to the database as the next version of a name, "
        "for RankAdaptorSampler(prior='db:NAME') and search --prior db:NAME.",
    )
    learn.set_defaults(run=_meta_train)
    learn.add_argument("--storage", required=True, metavar="URL", help="Optuna storage")
    learn.add_argument(
        "--study",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="studies to learn from, with * and ? (default: all)",
    )
    learn.add_argument("--name", default="default", metavar="NAME", help="of the prior (default: %(default)s)")

    keep = commands.add_parser(
        "priors",
        help="list, show and tidy the priors of a database",
        description="list: all versions. show: what PRIOR was learned from and how well it transfers. prune: remove "
        "old versions that no study uses. gc: remove what belongs to deleted studies.",
    )
    keep.set_defaults(run=_priors)
    keep.add_argument("action", choices=("list", "show", "prune", "gc"), metavar="list|show|prune|gc")
    keep.add_argument("prior", nargs="?", metavar="PRIOR", help="show: as for search --prior. prune: db:NAME alone")
    keep.add_argument("--storage", metavar="URL", help="Optuna storage")
    keep.add_argument("--keep", type=int, default=3, metavar="N", help="newest versions to keep (default: %(default)s)")

    board = commands.add_parser("dashboard", help="browse studies in optuna-dashboard")
    board.set_defaults(run=_dashboard)
    board.add_argument("--storage", required=True, metavar="URL", help="Optuna storage")
    board.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    board.add_argument("--port", type=int, default=8080, help="default: %(default)s")
    board.add_argument("--artifact-dir", metavar="DIR", help="folder of the study's artifacts")
    return parser


def _quickstart(args: argparse.Namespace) -> None:
    from rankadaptor_optuna.jobs.quickstart import Quickstart, run, storage_url
    from rankadaptor_optuna.studies.storage import masked
    from rankadaptor_optuna.views.report import table, verdict
    from rankadaptor_optuna.views.tables import as_text

    config = Quickstart(
        out=args.out,
        trials=args.trials,
        seed=args.seed,
        model=args.model,
        ratio=args.ratio,
        candidates=args.candidates,
        budget=args.budget,
        granularity=args.granularity,
        steps=args.steps,
        storage=args.storage,
        study_name=args.study,
    )
    outcome = run(config, say=lambda line: print(line, flush=True))
    print(f"\n{as_text(table(outcome))}\n\n{verdict(outcome)}\n")
    print(f"Done in {outcome.seconds / 60:.1f} minutes. Report: {args.out / 'report.md'}")
    print(f"Browse the trials: rankadaptor dashboard --storage {masked(storage_url(config))}")


def _search(args: argparse.Namespace) -> None:
    import optuna

    from rankadaptor_optuna.jobs.recipe import Recipe
    from rankadaptor_optuna.jobs.search import search
    from rankadaptor_optuna.jobs.stored import stored_recipe
    from rankadaptor_optuna.recovery.models import quiet
    from rankadaptor_optuna.recovery.processes import process_index

    quiet()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if args.recipe is None and args.storage is None:
        raise ValueError("give a recipe, or the --storage and --study of one that runs already.")
    recipe = stored_recipe(args.storage, args.study) if args.recipe is None else Recipe.load(args.recipe)
    search(
        recipe,
        args.out,
        trials=args.trials,
        storage=args.storage,
        study_name=args.study,
        prior=None if args.prior == "none" else args.prior,
        on_bad_prior=args.on_bad_prior,
        say=lambda line: print(line, flush=True),
    )
    if process_index() == 0:
        print(f"Ranks, rank_pattern and alpha_pattern: {args.out / 'recommendation.json'}")


def _export(args: argparse.Namespace) -> None:
    import optuna

    from rankadaptor_optuna.jobs.export import export
    from rankadaptor_optuna.recovery.models import quiet

    quiet()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options = {"pruned": args.pruned, "steps": args.steps, "seed": args.seed, "merge": args.merge}
    export(args.storage, args.study, args.out, **options, say=lambda line: print(line, flush=True))
    print(f"Adapter, rank_pattern.json and model card: {args.out}")


def _compare(args: argparse.Namespace) -> None:
    import optuna

    from rankadaptor_optuna.jobs.compare import compare, table
    from rankadaptor_optuna.recovery.models import quiet
    from rankadaptor_optuna.views.tables import as_text

    quiet()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    comparison = compare(
        args.storage,
        args.study,
        args.out,
        pruned=args.pruned,
        seeds=args.seeds,
        tasks=[name for name in (args.tasks or "").split(",") if name],
        include_path=args.include_path,
        limit=args.limit,
        say=lambda line: print(line, flush=True),
    )
    print(f"\n{as_text(table(comparison.rows))}\n\nMarkdown, JSON and picture: {args.out}")


def _prune(args: argparse.Namespace) -> None:
    from rankadaptor_optuna.jobs.prune import prune_checkpoint
    from rankadaptor_optuna.recovery.models import quiet

    quiet()
    given = {k: v for k, v in vars(args).items() if v is not None}
    options = {k: v for k, v in given.items() if k not in ("command", "run", "model", "out", "preset", "dtype")}
    found = prune_checkpoint(args.model, args.out, options, preset=args.preset is not None, dtype=args.dtype)
    pruned = found.pruned
    print("layer  removed: heads  channels  parameters  importance")
    for layer in pruned.profile:
        shares = (layer.heads_removed, layer.channels_removed, layer.parameters_removed, layer.importance_removed)
        cells = (f"{share:>{width}.1%}" for share, width in zip(shares, (14, 8, 10, 10), strict=True))
        print(f"{layer.layer:5}  " + "  ".join(cells))
    print(
        f"Removed {pruned.parameters_removed:.2%} of the blocks' parameters ({found.ratio:.2%} asked), "
        f"{pruned.total_parameters_removed:.2%} of all: {found.parameters_before:,} -> {found.parameters_after:,}."
    )
    print(f"Saved to {args.out} as {type(pruned.model).__name__}.")


def _import(args: argparse.Namespace) -> None:
    from rankadaptor_optuna.pruning.importing import import_checkpoint
    from rankadaptor_optuna.recovery.models import quiet

    quiet()
    found = import_checkpoint(args.file, args.out, args.tokenizer, allow_pickle=args.allow_pickle)
    parameters = sum(p.numel() for p in found.model.parameters())
    print(
        f"{args.file}: {len(found.profile)} layers, {parameters:,} parameters, {found.parameters_removed:.2%} of the "
        "blocks' parameters pruned."
    )
    print(f"Saved to {args.out} as {type(found.model).__name__}.")
    if not found.has_tokenizer:
        print("The file's tokenizer could not be read: none was saved. Name one with --tokenizer.")


def _meta_train(args: argparse.Namespace) -> None:
    import optuna

    from rankadaptor_optuna.jobs.meta_train import train_prior
    from rankadaptor_optuna.views.priors import card_text

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found = train_prior(args.storage, args.name, args.study, say=lambda line: print(line, flush=True))
    print(f"{card_text(found.prior)}\nStored as {found.version}: RankAdaptorSampler(prior='db:{found.version.name}')")


def _priors(args: argparse.Namespace) -> None:
    import optuna

    from rankadaptor_optuna.jobs import priors as priors_job
    from rankadaptor_optuna.priors.store import parse_reference
    from rankadaptor_optuna.views import priors as priors_view
    from rankadaptor_optuna.views.tables import as_text

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if args.action == "show":
        prior = priors_job.read_prior(args.prior or "pretrained", args.storage)
        print(priors_view.card_text(prior))
        if "tasks" in prior.card:
            print(f"\n{as_text(priors_view.tasks_table(prior))}")
        return
    if args.storage is None:
        raise ValueError(f"{args.action} needs --storage URL.")
    if args.action == "list":
        print(as_text(priors_view.versions_table(args.storage)))
    elif args.action == "prune":
        name = None if args.prior is None else parse_reference(args.prior)[0]
        removed = priors_job.prune_versions(args.storage, args.keep, name)
        print(f"Removed {', '.join(map(str, removed)) or 'nothing'}.")
    else:
        gone = priors_job.collect_unused(args.storage)
        print(
            f"Forgot the uses of {len(gone.studies)} deleted studies{': ' if gone.studies else ''}"
            f"{', '.join(gone.studies)}. Removed {', '.join(map(str, gone.versions)) or 'no version'}."
        )


def _dashboard(args: argparse.Namespace) -> None:
    from rankadaptor_optuna.views.server import serve

    serve(args.storage, host=args.host, port=args.port, artifact_dir=args.artifact_dir)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; 0 on success, 2 on bad input (one line on stderr), 130 when interrupted."""
    args = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    # on a machine with other work, threads that spin long while they wait make everything several times slower
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    try:
        args.run(args)
    except (ValueError, ImportError) as error:
        print(f"rankadaptor {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nInterrupted. Run the same command again to go on.", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
