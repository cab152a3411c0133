"""The pictures of MLflow's pages in the README, from the runs of `make demo`.

Needs Chromium with its driver, the output of `make demo`, and a second training:

python train_vqvae.py --path_to_data data/digits/digits.csv --patch_size 2 --codebook_size 64 \\
    --learning_rate 4e-3 --max_epochs 10 --evaluate_every 110 --experiment demo \\
    --register digits-tokenizer --output_dir outputs/second
"""

import argparse
import contextlib
import io
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
from urllib.parse import quote

from PIL import Image

from utils import cli

STORE = "sqlite:///mlflow.db"
FIRST, SECOND = Path("outputs/demo/tokenizer"), Path("outputs/second")
WIDTH = 1000  # pixels of the pictures
FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
    *("disable-background-networking", "disable-component-update", "disable-sync"),
    *("disable-dev-shm-usage", "hide-scrollbars"),
)
ASSISTANT = "[data-component-id='mlflow.assistant.chat_panel.close']"  # closes its panel
# how many pictures of at least so many pixels are shown, and whether a curve is
PICTURES = """return [...document.images].filter(
    image => image.complete && Math.max(image.naturalWidth, image.naturalHeight) >= arguments[0]
).length"""
CURVES = "return document.querySelectorAll('.js-plotly-plot .scatterlayer path').length"
PATIENCE = 120  # seconds, of a machine that has other things to do


@contextlib.contextmanager
def mlflow_server(store: str, folder: Path) -> Iterator[str]:
    """Run `mlflow server` on a store, in `folder`; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store]
    with subprocess.Popen(
        [*command, "--port", str(port), "--workers", "1"],
        cwd=folder,
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # more processes
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(lambda: answers(f"{address}/health"))
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(address, timeout=2).close()
    except OSError:
        return False
    return True


def wait_for(condition: Callable[[], Any], seconds: float = PATIENCE) -> Any:
    """The value of `condition` as soon as it is true; a TimeoutError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError("the page does not show what was expected")
        time.sleep(0.3)
    return found


@contextlib.contextmanager
def chromium(width: int = 1500, height: int = 1400) -> Iterator[Any]:
    """Debian's Chromium without a window, driven by Selenium."""
    from selenium import webdriver

    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        raise cli.UserError("no chromium and chromedriver on PATH; install both packages")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for flag in (*FLAGS, f"window-size={width},{height}"):
        options.add_argument(f"--{flag}")
    opened = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    opened.set_script_timeout(PATIENCE)  # a page of many charts takes long
    try:
        yield opened
    finally:
        opened.quit()


def open_page(browser: Any, server: str, page: str) -> None:
    """Open a page of MLflow's UI, by what follows # in its address."""
    browser.get("about:blank")  # a new address behind # alone loads nothing
    mode = "&" if "?" in page else "?"
    browser.get(f"{server}/#/{page}{mode}workflowType=machine_learning")


def save(browser: Any, path: Path) -> None:
    """Save what the browser shows, `WIDTH` pixels wide, without MLflow's assistant."""
    for button in browser.find_elements("css selector", ASSISTANT):
        button.click()
    time.sleep(2)  # charts move into place
    shown = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    shown.thumbnail((WIDTH, 2 * WIDTH), Image.Resampling.LANCZOS)
    shown.quantize(128).save(path, optimize=True)
    print(path)


def main(arguments: argparse.Namespace) -> None:
    import mlflow

    for folder in (FIRST, SECOND):
        if not (folder / "status.json").exists():
            raise cli.UserError(
                f"no training in {folder}; run `make demo` and the training that --help shows"
            )
    client = mlflow.MlflowClient(STORE)
    experiment = client.get_experiment_by_name("demo").experiment_id
    oldest_first = ["attributes.start_time"]
    run = client.search_runs([experiment], "tags.stage = 'tokenizer'", order_by=oldest_first)[
        0
    ].info
    with mlflow_server(STORE, Path.cwd()) as server, chromium() as browser:
        open_page(browser, server, f"experiments/{experiment}/runs/{run.run_id}/model-metrics")
        wait_for(lambda: browser.execute_script(PICTURES, 60) >= 4)
        wait_for(lambda: browser.execute_script(CURVES))
        save(browser, arguments.folder / "mlflow_metrics.png")

        tokenizers = "searchFilter=" + quote("tags.stage = 'tokenizer'")
        compared = f"experiments/{experiment}/runs?compareRunsMode=ARTIFACT&{tokenizers}"
        open_page(browser, server, compared)
        wait_for(lambda: browser.execute_script(PICTURES, 100) >= 4)
        save(browser, arguments.folder / "mlflow_compare.png")

        open_page(browser, server, "models/digits-tokenizer")
        wait_for(lambda: "champion" in browser.find_element("tag name", "body").text)
        save(browser, arguments.folder / "mlflow_registry.png")


if __name__ == "__main__":
    parser = cli.make_parser(__doc__, prog="python -m benchmarks.screenshots")
    parser.add_argument("--folder", type=Path, default=Path("readme_images"))
    cli.run(main, parser)
