"""What MLflow's pages really show of a run: Debian's Chromium looks at a live server."""

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

from tests.conftest import environment  # noqa: E402

BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.skipif(not BROWSER or not DRIVER, reason="no chromium and chromium-driver here"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PATIENCE = 180  # seconds, of a machine that has other things to do
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    *("disable-dev-shm-usage", "window-size=1500,6000"),
)
DRAWN = """return [...document.images].filter(
    image => image.complete && Math.max(image.naturalWidth, image.naturalHeight) >= arguments[0]
).length"""  # how many pictures of that size are really there


@pytest.fixture(scope="module")
def server(pipeline: Path) -> Iterator[str]:
    """The address of `mlflow server` on the store of a whole pipeline."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    store = f"sqlite:///{pipeline / 'mlflow.db'}"
    options = ("--backend-store-uri", store, "--port", str(port), "--workers", "1")
    with subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *options],
        cwd=pipeline,
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


@pytest.fixture(scope="module")
def tokenizer(pipeline: Path) -> Any:
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{pipeline / 'mlflow.db'}")
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(
        experiments, "tags.stage = 'tokenizer'", order_by=["attributes.start_time"]
    )
    return runs[0].info  # other tests train in this store after the pipeline


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


def test_curves_and_pictures_of_a_run(browser: Any, server: str, tokenizer: Any) -> None:
    open_page(browser, server, tokenizer, "model-metrics")
    wait_for(lambda: browser.execute_script(DRAWN, 200))
    wait_for(lambda: browser.find_elements("css selector", ".js-plotly-plot .scatterlayer path"))
    text = browser.find_element("tag name", "body").text
    assert "pictures" in text
    assert "val" in text


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
