"""`serve` in a real browser: the plots and the note are really there to be seen."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from playwright import sync_api

from rankadaptor_optuna import RankAdaptorSampler, RankSpace
from rankadaptor_optuna.database.attributes import PRIOR_ATTR, SPACE_ATTR
from rankadaptor_optuna.studies.reading import study_space

pytestmark = pytest.mark.e2e

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
TITLES = ["Rank of each layer over trials", "Best so far against uniform", "Recommended rank of each layer"]
# What a figure shows once plotly has drawn it: heat map cells, points, lines or bars.
DRAWN = ".heatmaplayer image, .scatterlayer .point, .scatterlayer .js-line, .barlayer .point"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with a study worth showing, one of another kind, and one whose stored space cannot be read."""
    url = f"sqlite:///{tmp_path_factory.mktemp('dashboard') / 'study.db'}"
    space = RankSpace(26, budget="uniform:8", costs=[9216] * 26, profile=[0.1 + 0.01 * i for i in range(26)])
    sampler = RankAdaptorSampler(space, prior=None, seed=0)
    study = optuna.create_study(storage=url, study_name="shown", direction="maximize", sampler=sampler)
    study.optimize(lambda trial: sum(r * i for i, r in space.suggest(trial).items()) / 1e4, n_trials=12)
    broken = optuna.create_study(storage=url, study_name="broken")
    broken.set_user_attr(SPACE_ATTR, {"format": 99})
    other = optuna.create_study(storage=url, study_name="other")
    other.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
    return url


@pytest.fixture(scope="module")
def server(url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Address of a running server, and what it writes to stderr."""
    folder = tmp_path_factory.mktemp("server")
    code = "import sys; from rankadaptor_optuna.views.server import serve; "
    code += "serve(sys.argv[1], port=0, artifact_dir=sys.argv[2], prior=None)"
    command = [sys.executable, "-c", code, url, str(folder / "artifacts")]
    with (folder / "stderr").open("w") as stderr:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        try:
            address = re.search(r"http://\S+", process.stdout.readline())
            assert address, (folder / "stderr").read_text()
            watchdog.cancel()
            yield address[0], folder / "stderr"
        finally:
            watchdog.cancel()
            process.terminate()
            process.wait(30)


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator[sync_api.Browser]:
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield started
        started.close()


@pytest.fixture
def page(browser: sync_api.Browser) -> Iterator[sync_api.Page]:
    """A page that fails the test on any error in its console or scripts."""
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(60_000)
    errors: list[str] = []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    page.close()
    assert errors == []


def test_every_plot_is_drawn_inside_its_card(server: tuple[str, Path], page: sync_api.Page) -> None:
    page.goto(f"{server[0]}dashboard/studies/1")
    for title in TITLES:
        plot = page.locator("[id^='user-defined-plot']", has_text=title)
        plot.scroll_into_view_if_needed()
        sync_api.expect(plot.locator(DRAWN).first).to_be_visible()
        outer = plot.bounding_box()
        assert outer["width"] > 400
        assert outer["height"] > 400
        for part in plot.locator(".gtitle, .gtitle-subtitle, .xtitle, .ytitle, .y2title, .legendtext").all():
            inner = part.bounding_box()
            assert inner["x"] >= outer["x"]
            assert inner["y"] >= outer["y"]
            assert inner["x"] + inner["width"] <= outer["x"] + outer["width"]
            assert inner["y"] + inner["height"] <= outer["y"] + outer["height"]


def test_no_legend_covers_a_title(server: tuple[str, Path], page: sync_api.Page) -> None:
    page.goto(f"{server[0]}dashboard/studies/1")
    for title in TITLES[1:]:
        plot = page.locator("[id^='user-defined-plot']", has_text=title)
        sync_api.expect(plot.locator(".legend")).to_be_visible()
        legend = plot.locator(".legend").bounding_box()
        for part in plot.locator(".gtitle, .gtitle-subtitle, .xtitle").all():
            text = part.bounding_box()
            assert text["y"] + text["height"] <= legend["y"] or text["y"] >= legend["y"] + legend["height"]


def test_the_note_shows_the_recommendation(server: tuple[str, Path], page: sync_api.Page) -> None:
    page.goto(f"{server[0]}dashboard/studies/1/note")
    sync_api.expect(page.get_by_role("heading", name="Recommended ranks")).to_be_visible()
    sync_api.expect(page.get_by_text("Predicted score")).to_be_visible()
    sync_api.expect(page.locator("table tr")).to_have_count(1 + 26)
    code = page.locator("code", has_text="LoraConfig(")
    code.scroll_into_view_if_needed()
    sync_api.expect(code).to_be_visible()
    assert page.get_by_text("[//]").count() == 0  # our markers are not shown
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")  # nothing too wide


def test_a_study_that_cannot_be_published_is_named_and_the_others_are_shown(
    server: tuple[str, Path], page: sync_api.Page
) -> None:
    warnings = [line for line in server[1].read_text().splitlines() if line.startswith("warning: study")]
    assert len(warnings) == 1
    assert "'broken' is not published: ValueError: the rank space stored with" in warnings[0]
    page.goto(server[0])
    for name in ("shown", "broken", "other"):
        sync_api.expect(page.get_by_text(name, exact=False).first).to_be_visible()


def test_publishing_leaves_the_study_itself_as_it_was(server: tuple[str, Path], url: str) -> None:
    study = optuna.load_study(study_name="shown", storage=url)
    assert len(study.trials) == 12
    assert study_space(study).n_layers == 26
    assert study.user_attrs.keys() == {SPACE_ATTR, PRIOR_ATTR}
