"""What MLflow's pages really show of a run: Debian's Chromium looks at a live server."""

import os
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")  # of requirements-dev.txt

from PIL import Image  # noqa: E402

from benchmarks.screenshots import (  # noqa: E402
    CURVES,
    PICTURES,
    chromium,
    mlflow_server,
    open_page,
    wait_for,
)
from tests.conftest import run_script  # noqa: E402
from utils import cli, tracking  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        not shutil.which("chromium") or not shutil.which("chromedriver"),
        reason="no chromium and chromium-driver here",
    ),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SEARCH = "css selector", "input[placeholder='Search metric charts']"
# All letters at once: MLflow draws the charts again for each one that is typed.
TYPE = """const value = Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, 'value');
value.set.call(arguments[0], arguments[1]);
arguments[0].dispatchEvent(new Event('input', {bubbles: true}));"""
ENLARGE = "document.querySelector('[data-component-id=fullscreen_button_chartcard]').click()"
# Whether a picture is seen whole in an enlarged card, which ends above the slider.
ENLARGED = """return [...document.querySelectorAll('[role=dialog] img')].some(image => {
    const place = image.getBoundingClientRect();
    return place.height > 64 && place.top > 0 && place.bottom < 0.85 * window.innerHeight;
})"""
SOME = "pictures|evaluation|generated|/mse|bits_per_token"  # to draw all charts takes minutes
# What the stages and an evaluation log to the run of a training.
LOGGED = {
    0: ("reconstructions", "code_usage", "decoded_codes", "best_reconstructions", "evaluation"),
    1: ("samples", "best_samples", "generated"),
}


@pytest.fixture(scope="module")
def finished(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the pipeline's store, with an evaluation and three trainings that differ."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copy(pipeline / "mlflow.db", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
        (tokenizer,) = pipeline.glob("outputs/tokenizer-*")
        data = ("--model_dir", tokenizer, "--path_to_data", pipeline / "data/data.csv")
        run_script("evaluate.py", "reconstructions", *data, "--output_dir", "evaluated")
        for number, given in enumerate(({}, {"dropout": 0.5}, {"dropout": 0.5, "dim": 32})):
            train(number, given)
        yield folder


def train(number: int, given: dict[str, Any]) -> None:
    """A run of the experiment `three` with these flags."""
    flags = cli.Flags(run_name="", **given)
    flags.given = frozenset(given)
    name = tracking.name_of(flags, f"gpt-{number + 1}x16")
    options = {"experiment": "three", "params": {"batch_size": 4}, "flags": flags}
    with tracking.Run(Path(f"three/{number}"), stage="gpt", run_name=name, **options) as run:
        for step in (0, 10):
            run.metrics("val", {"bits_per_token": 4.0 - number - step / 20}, step)
            picture = Image.new("RGB", (64, 64), (80 * number, 0, 0))
            run.picture("pictures/samples", picture, step)
        run.metrics("test", {"fd_classifier": 2.0 + number}, 0)


@pytest.fixture(scope="module")
def server(finished: Path) -> Iterator[str]:
    """The address of `mlflow server` on the store of a whole pipeline."""
    with mlflow_server(f"sqlite:///{finished / 'mlflow.db'}", finished) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Its window is tall: MLflow loads what is in view alone."""
    with chromium(height=2600) as driver:
        yield driver


def runs_of(folder: Path, experiment: str) -> list[Any]:
    """The runs of an experiment, the oldest first."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    number = client.get_experiment_by_name(experiment).experiment_id
    return client.search_runs([number], order_by=["attributes.start_time"])


def page_of(run: Any, page: str) -> str:
    return f"experiments/{run.info.experiment_id}/runs/{run.info.run_id}/{page}"


def text_of(browser: Any) -> str:
    return browser.find_element("tag name", "body").text


def screenshot(browser: Any, name: str) -> None:
    """Save what is shown to the folder of the environment's SCREENSHOTS, to look at it."""
    if folder := os.environ.get("SCREENSHOTS"):
        time.sleep(3)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def shows(browser: Any, pictures: int, side: int, curves: int) -> bool:
    """Whether so many pictures of at least `side` pixels, and curves, are there."""
    found = browser.execute_script(PICTURES, side), browser.execute_script(CURVES)
    return found[0] >= pictures and found[1] >= curves


@pytest.mark.parametrize("number", LOGGED, ids=["tokenizer", "GPT"])
def test_curves_and_pictures_of_the_runs_of_all_stages(
    browser: Any, server: str, finished: Path, number: int
) -> None:
    """Those of the GPT's run were hidden by a file that stage 5 logged."""
    names = LOGGED[number]
    browser.set_window_size(1500, 500)  # until then MLflow draws all that is in view
    open_page(browser, server, page_of(runs_of(finished, "data")[number], "model-metrics"))
    search = wait_for(lambda: browser.find_elements(*SEARCH))[0]
    browser.execute_script(TYPE, search, SOME)
    browser.set_window_size(1500, 2600)
    wait_for(partial(shows, browser, len(names), 200, 1))
    screenshot(browser, f"run-{number}")
    text = text_of(browser)
    for name in names:
        assert name[:12] in text  # longer ones are cut off
    assert "No image" not in text
    browser.set_window_size(1500, 1000)
    browser.execute_script(ENLARGE)
    wait_for(lambda: browser.execute_script(ENLARGED))
    screenshot(browser, f"enlarged-{number}")
    browser.set_window_size(1500, 2600)


def test_three_runs_side_by_side(browser: Any, server: str, finished: Path) -> None:
    runs = runs_of(finished, "three")
    ids = ",".join(f'"{run.info.run_id}"' for run in runs)
    number = runs[0].info.experiment_id
    open_page(browser, server, f'compare-runs?runs=[{ids}]&experiments=["{number}"]')
    names = ["gpt-1x16", "gpt-2x16-dropout0.5", "gpt-3x16-dropout0.5"]
    wait_for(lambda: all(name in text_of(browser) for name in names))
    screenshot(browser, "compare")
    text = text_of(browser)
    for words in ("flags", "none", "dropout=0.5", "dim=32 dropout=0.5", "test/fd_classifier"):
        assert words in text
    open_page(browser, server, f"experiments/{number}/runs?compareRunsMode=CHART")
    wait_for(partial(shows, browser, len(runs), 64, len(runs)))
    screenshot(browser, "charts")
    assert all(name in text_of(browser) for name in names)


def test_the_table_of_a_run(browser: Any, server: str, finished: Path) -> None:
    page = page_of(runs_of(finished, "data")[0], "artifacts/tables/reconstructions.json")
    open_page(browser, server, page)
    wait_for(partial(shows, browser, 4, 128, 0))
    text = text_of(browser)
    assert "image_path" in text
    assert "reconstruction" in text
