"""``rankadaptor prune``; its options are the fields of ``PruningConfig``."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from rankadaptor_optuna.cli.options import say
from rankadaptor_optuna.pruning.config import PruningConfig, option_help


def prune(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Model folder or Hub name, or embedded: SmolLM2-135M-Instruct.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    preset: Annotated[
        Literal["llm-pruner"] | None,
        typer.Option(help="LLM-Pruner's published settings; other options change them."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Text, JSON, CSV, Parquet or Hub data set.", show_default="embedded text"),
    ] = None,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Number format; auto: the checkpoint's.")
    ] = "auto",
    **options: Any,  # noqa: ANN401
) -> None:
    """Remove the least important parts of a language model.

    Writes a checkpoint of safetensors and JSON. Methods llm-pruner and slimgpt take Llama, Mistral, Qwen2 and Qwen3
    models; shortened takes any decoder.
    """
    from rankadaptor_optuna.jobs.prune import prune_checkpoint
    from rankadaptor_optuna.views.pruning import pruning_summary

    given = {name: value for name, value in {"calibration": calibration, **options}.items() if value is not None}
    say(pruning_summary(prune_checkpoint(model, out, given, preset=preset is not None, dtype=dtype)))


def _signature() -> inspect.Signature:
    """Returns the signature of ``prune`` with an option for each field of ``PruningConfig``; None if not given."""
    own = list(inspect.signature(prune, eval_str=True).parameters.values())[:-1]
    hints, described = get_type_hints(PruningConfig), option_help()
    options = []
    for field in fields(PruningConfig):
        text, _, default = described[field.name].partition(" Default: ")
        option = typer.Option(None, help=text, show_default=default.rstrip(".") or str(field.default))
        kind = inspect.Parameter.KEYWORD_ONLY
        options.append(inspect.Parameter(field.name, kind, default=option, annotation=hints[field.name] | None))
    return inspect.Signature([*own, *options])


prune.__signature__ = _signature()  # type: ignore[attr-defined]
