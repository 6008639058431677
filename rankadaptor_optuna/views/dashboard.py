"""A study in optuna-dashboard: ranks over trials, progress against uniform, and a note that recommends."""

from __future__ import annotations

import os
import socket
import sys
import textwrap
from contextlib import suppress
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

import numpy as np
import optuna
from optuna.study import Study

from rankadaptor_optuna.priors.choice import PriorChoice, PriorLike
from rankadaptor_optuna.space import RankSpace
from rankadaptor_optuna.studies.reading import study_ranks, study_space
from rankadaptor_optuna.studies.recommendation import Recommendation, recommend
from rankadaptor_optuna.studies.storage import masked, open_storage
from rankadaptor_optuna.views.figures import History, heat_map_figure, history, history_figure, ranks_figure

HEAT_MAP_ID = "rankadaptor-1-ranks-over-trials"
HISTORY_ID = "rankadaptor-2-best-so-far"
RANKS_ID = "rankadaptor-3-recommended-ranks"
_BEGIN = "[//]: # (rankadaptor: written anew by each publish_dashboard; your own text goes above or below)"
_END = "[//]: # (rankadaptor: end)"
_LINE = 60  # characters of a long text on one line of code


def publish_dashboard(study: Study, *, prior: PriorLike = "pretrained") -> None:
    """Publishes plots and a note with the recommendation to the study, where optuna-dashboard shows them.

    Each call replaces the plots, and of the note what lies between two (invisible) markers: the rest stays.
    Publish a study from one process at a time; two at once may leave a plot unreadable until the next call.

    Args:
        study: A study in any storage; any sampler may have made its trials. Without finished trials the note
            says so and there are no plots; with several objectives there is no recommendation.
        prior: See ``recommend``.

    Raises:
        ImportError: The extra ``dashboard`` is not installed.
        ValueError: The study's finished trials have no rank parameters.
    """
    _require_extra()
    from optuna_dashboard import get_note, save_note, save_plotly_graph_object

    h = history(study)
    if h.numbers and not h.names:
        raise ValueError("the study has no rank parameters: names with a layer number and integer values.")
    found = recommend(study, prior=prior) if h.numbers and h.scores is not None else None
    figures = {}
    if h.numbers:
        figures[HEAT_MAP_ID] = heat_map_figure(h)
    if found is not None:
        figures |= {HISTORY_ID: history_figure(h), RANKS_ID: ranks_figure(h, found)}
    for name, figure in figures.items():
        save_plotly_graph_object(study, figure, graph_object_id=name)
    old = get_note(study)
    new = _merged(old, note(h, found, study_space(study)))
    if new != old:
        save_note(study, new)


def serve(
    storage_url: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    artifact_dir: str | Path | None = None,
    prior: PriorLike = "pretrained",
) -> None:
    """Publishes every study with rank parameters in a database, then runs optuna-dashboard until interrupted.

    The server asks for no password: whoever reaches ``host`` can read and change the studies.

    Args:
        storage_url: The database; its tables are created where they are missing.
        host: Address to listen on. Default: this machine only.
        port: Port to listen on; 0 takes any free one.
        artifact_dir: Folder of the studies' artifacts, created where it is missing. Default: no artifacts.
        prior: See ``recommend``. By default a study whose prior cannot be had is shown with the shipped one.

    Raises:
        ImportError: The extra ``dashboard`` is not installed.
        ValueError: The database cannot be opened, or the address cannot be listened on.
    """
    _require_extra()
    from optuna.artifacts import FileSystemArtifactStore
    from optuna_dashboard import wsgi

    if not isinstance(prior, PriorChoice):
        prior = PriorChoice(prior, on_bad="pretrained")  # a study whose prior was lost is still worth showing
    storage = open_storage(storage_url)
    with _listening(host, port) as server:
        for name in optuna.get_all_study_names(storage):
            try:
                study = optuna.load_study(study_name=name, storage=storage)
                if study_ranks(study):
                    publish_dashboard(study, prior=prior)
            except Exception as error:  # one odd study must not hide the others
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"warning: study {name!r} is not published: {reason:.300}", file=sys.stderr, flush=True)
        if artifact_dir is not None:
            os.makedirs(artifact_dir, exist_ok=True)
        artifacts = None if artifact_dir is None else FileSystemArtifactStore(artifact_dir)
        server.set_app(wsgi(storage, artifact_store=artifacts))
        shown = f"[{host}]" if ":" in host else host
        print(f"{masked(storage_url)} at http://{shown}:{server.server_port}/ (Ctrl-C to quit)", flush=True)
        with suppress(KeyboardInterrupt):
            server.serve_forever()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True  # threads: a browser's idle connection would block the next request

    def __init__(self, host: str, port: int) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)


class _Handler(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: ANN401
        """Says nothing: the page polls every few seconds."""


def _listening(host: str, port: int) -> WSGIServer:
    try:
        return _Server(host, port)
    except (OSError, OverflowError) as error:
        hint = "Stop what uses it, or choose another port (0 takes any free one)."
        raise ValueError(f"cannot listen on port {port} of {host}: {error}. {hint}") from None


def _require_extra() -> None:
    try:
        import optuna_dashboard  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        hint = "the dashboard needs optuna-dashboard and plotly: pip install 'rankadaptor-optuna[dashboard]'"
        raise ImportError(f"{hint} ({error})") from None


def note(h: History, found: Recommendation | None, space: RankSpace | None) -> str:
    """The recommendation in GitHub-flavoured Markdown; ``found`` is None where there can be none."""
    if h.scores is None:
        return "## Recommended ranks\n\nA recommendation needs one objective; this study has several."
    if found is None:
        return "## Recommended ranks\n\nNo recommendation yet: the study has no finished trial."
    closest = "; ".join(f"trial {n}, ranks that differ {d}, {y:.5g}" for n, d, y in found.evidence.closest)
    lines = ["## Recommended ranks", "", f"**{found.evidence.statement}**", ""]
    lines += [f"* Predicted {h.objective}: {found.predicted:.5g} ± {found.std:.2g} (one standard deviation)."]
    if h.uniform_score is not None:
        lines += [f"* Uniform configuration: {h.uniform_score:.5g} (trials: {h.is_uniform.sum()})."]
    if h.best is not None and np.isfinite(h.best[-1]):
        number = h.numbers[np.flatnonzero(h.within_budget & (h.scores == h.best[-1]))[0]]
        lines += [f"* Best single trial, noise included: {h.best[-1]:.5g} (trial {number})."]
    lines += [f"* {_cost_text(found, space)}.", f"* Closest finished trials: {closest}.", ""]
    lines += [h.converged, ""] if h.converged else []
    lines += [*_table(h, found), ""]
    if any(found.all_ranks.values()):
        lines += ["Ready to paste, with `target_modules` as in your training:", "", *_code(found)]
    return "\n".join(lines)


def _cost_text(found: Recommendation, space: RankSpace | None) -> str:
    of_ranks = space is None or set(space.costs) == {1.0}
    text = f"{'Sum of ranks' if of_ranks else 'Trainable parameters'}: {found.cost:,.0f}"
    if space is None or space.budget is None:
        return f"{text}, no budget"
    return f"{text} of {space.budget:,.0f} in the budget ({found.cost / space.budget:.1%})"


def _table(h: History, found: Recommendation) -> list[str]:
    kind = "layer" if "" in h.series else "sublayer"
    columns: dict[str, list[str]] = {
        kind: [str(label) for label in h.labels],
        "rank": [str(found.params[name]) for name in h.names],
    }
    if h.uniform_ranks is not None:
        columns["uniform"] = [str(rank) for rank in h.uniform_ranks]
    if h.profile is not None:
        columns["weights pruned"] = [f"{taken:.1%}" for taken in h.profile]
    if h.sensitivity is not None:
        columns["of the sensitivity"] = [f"{share:.1%}" for share in h.sensitivity]
    rows = [list(columns), ["---:"] * len(columns), *map(list, zip(*columns.values(), strict=True))]
    table = ["| " + " | ".join(row) + " |" for row in rows]
    fixed = [f"{module} (rank {rank})" for module, rank in found.all_ranks.items() if module not in found.ranks]
    return table + (["", f"Not searched: {kind}s {', '.join(fixed)}."] if fixed else [])


def _code(found: Recommendation) -> list[str]:
    """The call of ``LoraConfig``, in lines of at most 88 characters: the note's page does not wrap code."""
    lines = []
    for name, value in found.all_ranks.lora_arguments(found.lora).items():
        if isinstance(value, str) and len(value) > _LINE:
            pieces = [value[start : start + _LINE] for start in range(0, len(value), _LINE)]
            lines += [f"    {name}=(", *(f"        {piece!r}" for piece in pieces), "    ),"]
        else:
            lines += textwrap.wrap(f"    {name}={value!r},", _LINE + 28, subsequent_indent=" " * 8)
    return ["```python", "from peft import LoraConfig", "", "config = LoraConfig(", *lines, ")", "```"]


def _merged(old: str, ours: str) -> str:
    """The study's note with our part exchanged, or appended; everything else as it was."""
    block = f"{_BEGIN}\n\n{ours}\n\n{_END}"
    before, begin, rest = old.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if begin and end:
        return before + block + after
    return f"{old.rstrip()}\n\n{block}\n" if old.strip() else f"{block}\n"
