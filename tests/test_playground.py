"""playground.py: what the page does with the models, its commands, and clicks in a browser."""

import os
import shlex
import shutil
import sys
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import playground
from benchmarks.screenshots import chromium, wait_for
from playground import Images, Playground, make_page, read_fields
from tests.conftest import ROOT, run_script
from tests.test_transformer_generation import CODES, GRID, sampled, write_gpt, write_tokenizer
from transformer import GPT
from utils import cli, figures
from utils.data import captions
from utils.data.masks import covered_pixels
from utils.data.vocabulary import GridMeta, Vocabulary, read_vocabulary
from vqvae import VQVAE

SIZE = 24, 40
FLAGS = Namespace(model_path="gpt", model_dir="tokenizer", output_dir="out")


def make_playground(text: bool = False, depth: int = 1, **shape: Any) -> Playground:
    """Models that nobody trained, with classes, in the current folder."""
    torch.manual_seed(0)
    sha256 = write_tokenizer(Path("tokenizer"), depth)
    meta = captions.train_tokenizer(["a red blob", "a blob"], None) if text else None
    names = {"class_names": ("a", "b", "c"), "captions": meta, "depth": depth}
    write_gpt("gpt", Vocabulary(CODES, GRID, sha256, **names), **shape)
    gpt, tokenizer = GPT.from_pretrained("gpt"), VQVAE.from_pretrained("tokenizer")
    return Playground(gpt, tokenizer, read_vocabulary("gpt"), torch.device("cpu"), FLAGS)


def run_commands(text: str) -> list[np.ndarray]:
    """Run the shown commands; the images that they write."""
    for line in text.splitlines():
        python, script, *words = shlex.split(line)
        assert python == "python"
        run_script(os.path.relpath(script, ROOT), *words)
    folder = Path(words[words.index("--output_dir") + 1])
    return [np.asarray(Image.open(file)) for file in sorted(folder.glob("0*.png"))]


def shown(images: Images) -> list[np.ndarray]:
    return [np.asarray(figures.to_pil(image)) for image in images.pixels]


def brushed() -> torch.Tensor:
    """All of a few pixels of a few latent positions."""
    mask = torch.zeros(SIZE, dtype=torch.bool)
    mask[9:14, 10:30] = True
    return mask


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize(
    ("labels", "prompt"),
    [([], ""), (["c", "a"], "a blob"), ([], "@/etc/passwd 'red' \"blob\"")],
)
def test_the_commands_make_the_generated_images_again(labels: list[str], prompt: str) -> None:
    play = make_playground(text=bool(prompt))
    fields = read_fields(labels, prompt, 1.5, 0.9, -3, 4)
    images = play.sample(fields)
    text = play.commands(images, fields)
    assert all(
        np.array_equal(*pair) for pair in zip(run_commands(text), shown(images), strict=True)
    )
    assert torch.equal(sampled(Path("out/result/indices")), images.grids)
    expected = labels or ([""] if prompt else ["a", "b", "c"])
    assert [row.label for row in images.rows] == [expected[n % len(expected)] for n in range(4)]


@pytest.mark.usefixtures("store")
@pytest.mark.parametrize("order", [None, (1, 1)], ids=["raster", "any order"])
def test_a_filling_keeps_all_other_pixels_and_is_made_again(order: tuple | None) -> None:
    play, mask = make_playground(order_anneal=order), brushed()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), np.uint8)).save("x.png")
    image, fields = play.open("x.png", read_fields(["b"], "", 1, 1, 0, 1)), (1.5, 0.9, 7, 3)
    assert image.rows[0].label == "b"
    for labels in ([], ["c"]):
        filled = play.sample(read_fields(labels, "", *fields), (image, mask))
        known = ~mask.expand_as(filled.pixels)
        assert torch.equal(filled.pixels[known], image.pixels.expand_as(filled.pixels)[known])
        assert {row.label for row in filled.rows} == set(labels or "b")
        changed = (filled.grids != image.grids).any(dim=0)
        assert changed[2:4, 2:8].any()
        assert not changed[:2].any()
        text = play.commands(filled, read_fields(labels, "", *fields), (image, mask))
        pairs = zip(run_commands(text), shown(filled), strict=True)
        assert all(np.array_equal(*pair) for pair in pairs)


@pytest.mark.usefixtures("store")
def test_an_edited_token_changes_the_picture_and_its_likelihood() -> None:
    play = make_playground(depth=2)
    image = play.sample(read_fields([], "", 1, 1, 0, 1))
    before = play.likelihood(image)[1]
    assert before.shape == (GRID[0], 2 * GRID[1])
    prefix = play.prefix([image.rows[0].label], [""])
    nats = play.gpt.loss(prefix, image.grids).detach()
    torch.testing.assert_close(before.flatten() * np.log(2), nats[0])
    token, index = 37, (int(image.grids.view(-1)[37]) + 1) % CODES
    edited = play.edit(image, token, index)
    assert (edited.grids != image.grids).flatten().nonzero().tolist() == [[token]]
    probabilities, bits = play.likelihood(edited)
    assert bits.flatten()[token] == pytest.approx(-np.log2(probabilities[token, index].item()))
    assert torch.equal(bits.flatten()[:token], before.flatten()[:token])
    assert (edited.pixels != image.pixels).any()
    assert np.array_equal(run_commands(play.commands(edited))[0], shown(edited)[0])


def test_tokens_are_where_they_are_clicked() -> None:
    indices = torch.arange(12).view(3, 4)
    picture, side = figures.tokens(torch.zeros(1, 6, 8), indices, 6), figures.token_side(indices)
    assert picture.size == (4 * side, 3 * side)
    x, y = (np.asarray(picture) == figures.LINE).all(axis=2).nonzero()[::-1]
    assert {*(y // side * 4 + x // side)} == {6}


def test_pixels_with_a_touch_of_the_brush_are_brushed() -> None:
    layer = np.zeros((3 * SIZE[0], 3 * SIZE[1], 4), np.uint8)
    layer[8, 9:13, 3] = 1
    covered = covered_pixels(Image.fromarray(layer), SIZE)
    assert covered.nonzero().tolist() == [[2, 3], [2, 4]]


def test_what_a_user_does_wrong_is_one_line(
    error_of: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    play, fields = make_playground(), read_fields([], "", 1, 1, 0, 1)
    image = play.sample(fields)
    for value, text in ((False, "nothing is brushed"), (True, "all of the picture is brushed")):
        with pytest.raises(cli.UserError, match=text):
            play.sample(fields, (image, torch.full(SIZE, value)))
    Path("x.png").write_text("no picture")
    with pytest.raises(cli.UserError, match=r"x\.png cannot be read as an image: "):
        play.open("x.png", fields)
    flags = ("playground", "--model_path", "gpt", "--model_dir", "tokenizer")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert error_of(*flags).endswith("the playground needs Gradio; run: pip install gradio")

    def launch(*, server_name: str, server_port: int, share: bool, **options: Any) -> None:
        assert (server_name, server_port, share) == ("127.0.0.1", 7860, False)  # for nobody else
        raise OSError("Cannot find empty port in range: 7860-7860.")

    monkeypatch.setattr(playground, "make_page", lambda play: Namespace(launch=launch))
    themes = Namespace(Default=lambda **fonts: fonts)
    monkeypatch.setitem(sys.modules, "gradio", Namespace(themes=themes))
    assert "Cannot find empty port" in error_of(*flags)
    write_gpt("gpt", Vocabulary(CODES, GRID, condition=GridMeta(4, (2, 2))))
    assert "takes conditions, which the playground lacks" in error_of(*flags)


@pytest.fixture
def address() -> Iterator[str]:
    """Of the page, with models that nobody trained."""
    gradio = pytest.importorskip("gradio")
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("no chromium and chromium-driver here")
    page = make_page(make_playground())
    theme = gradio.themes.Default(font="sans-serif", font_mono="monospace")
    page.launch(
        quiet=True, prevent_thread_lock=True, theme=theme, css=playground.CSS, footer_links=[]
    )
    yield page.local_url
    page.close()


@pytest.mark.filterwarnings("ignore")  # of what Gradio uses
def test_the_page_is_clicked_through(address: str, tmp_path: Path) -> None:
    """Fields, an image, the brush, a token, an upload, the download; at the width of a phone."""
    from selenium.webdriver import ActionChains

    with chromium(width=1300, height=1400) as browser:

        def find(selector: str, text: str = "") -> Any:
            found = browser.find_elements("css selector", selector)
            return next(
                (x for x in found if text in (x.text or x.get_attribute("aria-label") or "")), 0
            )

        def commands(*words: str) -> str:
            """The shown commands, as soon as these words are in them."""
            shown = (
                x.get_attribute("value") for x in browser.find_elements("tag name", "textarea")
            )
            return next((x for x in shown if x and all(word in x for word in words)), "")

        def picture(width: int) -> Any:
            """The picture of tokens, as soon as it is shown."""
            found = browser.find_elements(
                "css selector", "[data-testid=image] img, .image-frame img"
            )
            return next((x for x in found if x.size["width"] >= width), None)

        def screenshot(name: str) -> None:
            if folder := os.environ.get("SCREENSHOTS"):
                time.sleep(3)
                browser.save_screenshot(str(Path(folder) / f"playground-{name}.png"))

        downloads = {"behavior": "allow", "downloadPath": str(tmp_path)}
        browser.execute_cdp_cmd("Browser.setDownloadBehavior", downloads)
        browser.get(address)
        wait_for(partial(find, "button", "Generate"))
        find("input[aria-label^=Classes]").send_keys("b\n")
        seed = find("input[aria-label=Seed]")
        seed.clear()
        seed.send_keys("5")
        find("button", "Generate").click()
        text = wait_for(partial(commands, "--labels b --num_images 16", "--seed 5"))
        assert "--complete" not in text
        token = wait_for(partial(picture, 300))
        screenshot("generated")

        canvas = wait_for(partial(find, "canvas"))
        drag = ActionChains(browser).move_to_element(canvas).click_and_hold()
        drag.move_by_offset(40, 20).release().perform()
        find("button", "Brush over").click()
        text = wait_for(partial(commands, "--complete", "--variations 16"))
        mask = np.asarray(Image.open(text.split("--mask ")[1].split()[0]))
        assert 0 < (~mask).mean() < 0.5
        screenshot("filled")

        side = token.size["width"] / GRID[1]
        offset = round((8.5 - GRID[1] / 2) * side), round((1.5 - GRID[0] / 2) * side)
        ActionChains(browser).move_to_element_with_offset(token, *offset).click().perform()
        choice = wait_for(partial(find, "input[aria-label^='Index in row 2, column 9']"))
        choice.click()
        wait_for(lambda: len(browser.find_elements("css selector", "[role=option]")) == CODES)
        options = browser.find_elements("css selector", "[role=option]")
        next(x for x in options if x.get_attribute("aria-selected") != "true").click()
        edited = wait_for(partial(commands, "images_from_indexes.py --indexes_path out/result-3"))
        assert "transformer_generation" not in edited

        upload = browser.find_elements("css selector", "input[type=file]")[-1]
        Image.new("RGB", (80, 48), "red").save(tmp_path / "red.png")
        upload.send_keys(str(tmp_path / "red.png"))
        wait_for(partial(find, "input[aria-label^='Index in row 1, column 1']"))
        find("button", "Download All").click()
        (file,) = wait_for(lambda: [*tmp_path.glob("*.zip")])
        assert len(zipfile.ZipFile(file).namelist()) == 1

        phone = {"width": 390, "height": 2600, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
        screenshot("phone")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
