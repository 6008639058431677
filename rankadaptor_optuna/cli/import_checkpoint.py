"""``rankadaptor import-checkpoint``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rankadaptor_optuna.cli.options import say


def import_checkpoint(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="pytorch_model.bin of LLM-Pruner.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to create.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Tokenizer folder or Hub name.", show_default="the tokenizer in FILE"),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read FILE, a pickle; without this option FILE is refused.")
    ] = False,
) -> None:
    """Convert a pickled checkpoint of LLM-Pruner.

    Converts LLM-Pruner's pytorch_model.bin to safetensors and JSON without running code from it.
    """
    from rankadaptor_optuna.pruning.importing import import_checkpoint as convert
    from rankadaptor_optuna.views.pruning import import_summary

    imported = convert(file, out, tokenizer, allow_pickle=allow_pickle)
    say(import_summary(file, out, imported))
