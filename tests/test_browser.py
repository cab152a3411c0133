"""What MLflow's pages really show of a run: Debian's Chromium looks at a live server."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

webdriver = pytest.importorskip("selenium.webdriver")  # of requirements-dev.txt

from PIL import Image  # noqa: E402

from tests.conftest import environment, run_script  # noqa: E402
from utils import cli, tracking  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not BROWSER or not DRIVER, reason="no chromium and chromium-driver here"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PATIENCE = 120  # seconds, of a machine that has other things to do
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    *("disable-dev-shm-usage", "window-size=2200,2400"),
)
DRAWN = """return [...document.images].filter(
    image => image.complete && Math.max(image.naturalWidth, image.naturalHeight) >= arguments[0]
).length"""  # how many pictures of that size are really there


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
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    store = f"sqlite:///{finished / 'mlflow.db'}"
    options = ("--backend-store-uri", store, "--port", str(port), "--workers", "1")
    with subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *options],
        cwd=finished,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            wait_for(lambda: answers(f"{address}/health"))
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def runs_of(folder: Path, experiment: str) -> list[Any]:
    """The runs of an experiment, the oldest first."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    number = client.get_experiment_by_name(experiment).experiment_id
    return client.search_runs([number], order_by=["attributes.start_time"])


@pytest.fixture(scope="module")
def tokenizer(finished: Path) -> Any:
    return runs_of(finished, "data")[0].info


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=2).close()
    except OSError:
        return False
    return True


def wait_for(condition: Callable[[], Any]) -> Any:
    """What `condition` says as soon as that is something."""
    deadline = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.3)
    return found


def open_page(browser: Any, server: str, run: Any, page: str) -> None:
    where = f"#/experiments/{run.experiment_id}/runs/{run.run_id}/{page}"
    browser.get("about:blank")  # a new address after the # alone loads nothing
    browser.get(f"{server}/{where}?workflowType=machine_learning")


def text_of(browser: Any) -> str:
    return browser.find_element("tag name", "body").text


def screenshot(browser: Any, name: str) -> None:
    """Save what is shown to the folder of the environment's SCREENSHOTS, to look at it."""
    if folder := os.environ.get("SCREENSHOTS"):
        time.sleep(3)
        browser.save_screenshot(str(Path(folder) / f"{name}.png"))


def show_pictures(browser: Any) -> None:
    """Unfold all sections and scroll through the page: MLflow loads pictures that are in view."""
    for one in browser.find_elements("css selector", "[aria-expanded=false] .ant-collapse-header"):
        one.click()
    height = browser.execute_script("return document.body.scrollHeight")
    for top in range(0, height, 1000):
        browser.execute_script("window.scrollTo(0, arguments[0])", top)
        time.sleep(0.2)


# What each stage logs to the run of a training.
PICTURES = {
    0: ("reconstructions", "code_usage", "decoded_codes", "best_reconstructions"),
    1: ("samples", "best_samples", "generated"),
}


@pytest.mark.parametrize("number", PICTURES)
def test_curves_and_pictures_of_the_runs_of_all_stages(
    browser: Any, server: str, finished: Path, number: int
) -> None:
    """Those of the GPT's run were hidden by a file that stage 5 logged."""
    open_page(browser, server, runs_of(finished, "data")[number].info, "model-metrics")
    wait_for(lambda: browser.find_elements("css selector", ".js-plotly-plot .scatterlayer path"))
    show_pictures(browser)
    wait_for(lambda: browser.execute_script(DRAWN, 200) >= len(PICTURES[number]))
    screenshot(browser, f"run-{number}")
    text = text_of(browser)
    for name in ("val", *PICTURES[number]):
        assert name in text
    if number == 0:
        assert "evaluation" in text
    assert "No image" not in text


def test_three_runs_side_by_side(browser: Any, server: str, finished: Path) -> None:
    runs = runs_of(finished, "three")
    ids = json.dumps([run.info.run_id for run in runs])
    number = runs[0].info.experiment_id
    browser.get("about:blank")
    browser.get(f'{server}/#/compare-runs?runs={ids}&experiments=["{number}"]')
    names = ["gpt-1x16", "gpt-2x16-dropout0.5", "gpt-3x16-dropout0.5"]
    wait_for(lambda: all(name in text_of(browser) for name in names))
    screenshot(browser, "compare")
    text = text_of(browser)
    for words in ("flags", "none", "dropout=0.5", "dim=32 dropout=0.5", "test/fd_classifier"):
        assert words in text
    browser.get("about:blank")
    browser.get(f"{server}/#/experiments/{number}/runs?compareRunsMode=CHART")
    wait_for(lambda: browser.find_elements("css selector", ".js-plotly-plot .scatterlayer path"))
    show_pictures(browser)
    wait_for(lambda: browser.execute_script(DRAWN, 64) >= len(runs))
    screenshot(browser, "charts")
    assert all(name in text_of(browser) for name in names)


def test_the_table_of_a_run(browser: Any, server: str, tokenizer: Any) -> None:
    open_page(browser, server, tokenizer, "artifacts/tables/reconstructions.json")
    wait_for(lambda: browser.execute_script(DRAWN, 128) >= 4)
    text = browser.find_element("tag name", "body").text
    assert "image_path" in text
    assert "reconstruction" in text


def test_the_slider_of_the_report(browser: Any, server: str, tokenizer: Any) -> None:
    open_page(browser, server, tokenizer, "artifacts/report.html")
    frame = wait_for(lambda: browser.find_elements("css selector", "iframe"))[0]
    browser.switch_to.frame(frame)
    card = wait_for(lambda: browser.find_elements("css selector", "[data-slider]"))[0]
    slider, images = card.find_element("tag name", "input"), "img:not([hidden])"
    (last,) = card.find_elements("css selector", images)
    assert int(last.get_attribute("naturalWidth")) >= 256
    slider.send_keys(webdriver.Keys.ARROW_LEFT)
    (shown,) = card.find_elements("css selector", images)
    before, after = (int(image.get_attribute("data-step")) for image in (last, shown))
    assert after < before
    assert shown.is_displayed()
    assert card.find_element("tag name", "output").text == f"step {after}"
    assert browser.find_elements("css selector", "svg path")
