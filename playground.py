"""Generate, fill and edit images in the browser, with a GPT and its tokenizer."""

from utils.cli import start_script

if __name__ == "__main__":
    start_script()

import math
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from transformer import GPT, SamplingParams, make_prefix, sampling
from utils import cli, distributed, figures
from utils.cli import UserError
from utils.data.captions import encode
from utils.data.conditioning import choose_embeddings, choose_texts
from utils.data.decoding import read_image
from utils.data.indices import IndicesMeta, write_indices
from utils.data.masks import KnownPixels, covered_pixels, known_positions
from utils.data.sources import Row
from utils.data.vocabulary import Vocabulary, read_vocabulary
from utils.provenance import load_model
from vqvae import VQVAE

SIDE, SMALL = 384, 128  # pixels of one image, and of one of many
NUMBERS = "guidance_scale", "temperature", "seed", "num_images"  # fields of the page
PICTURE = "picture.png"
# Labels above pictures instead of over them, and as many columns as there is room for.
CSS = "[data-testid=block-label] {position: static} .grid-container {grid-template-columns: "
CSS += "repeat(auto-fill, minmax(80px, 1fr)) !important}"


class Images(NamedTuple):
    """Grids (N, h, w[, depth]), int64, their images (N, C, H, W) in [-1, 1], and their rows."""

    grids: Tensor
    pixels: Tensor
    rows: Sequence[Row]


def read_fields(labels: Sequence[str], prompt: str, *numbers: float) -> Namespace:
    """The fields of the page as flags of transformer_generation.py; @ names no file here."""
    prompts = [f" {prompt}" if prompt.startswith("@") else prompt] if prompt else []
    flags = {"unconditional": False, "class_frequencies": False, "embeddings": ""}
    values = dict(zip(NUMBERS, numbers, strict=True))
    return Namespace(labels=labels, prompt=prompts, **flags, **values)


@dataclass(frozen=True)
class Playground:
    """What the page does with the models. An error that a user can cause is a UserError."""

    gpt: GPT
    tokenizer: VQVAE
    vocabulary: Vocabulary
    device: torch.device
    flags: Namespace  # of this script

    def prefix(self, labels: Sequence[str], captions: Sequence[str]) -> Tensor:
        """The prefix (N, P) of labels and captions, "" where there are none."""
        texts = encode(captions, self.vocabulary.captions)
        vectors = choose_embeddings(Namespace(embeddings=""), self.vocabulary, len(labels))
        return make_prefix(torch.tensor(self.vocabulary.tokens(labels)), vectors, texts)

    @torch.inference_mode()
    def decode(self, grids: Tensor, rows: Sequence[Row]) -> Images:
        """Grids with their images."""
        parts = [self.tokenizer.decode(x.to(self.device)).cpu() for x in grids.split(64)]
        return Images(grids, torch.cat(parts), rows)

    @torch.inference_mode()
    def open(self, file: str, fields: Namespace) -> Images:
        """The image of a file of any size, with the class and the prompt of the fields."""
        options = {name: x for name, x in self.tokenizer.config.image_options.items() if x}
        found = read_image(file, **options)
        if isinstance(found, str):
            raise UserError(f"{Path(file).name} cannot be read as an image: {found}")
        pixels = torch.tensor(found[1][None], device=self.device)
        image = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        row = Row(PICTURE, "".join(fields.labels[:1]), "", caption="".join(fields.prompt))
        return Images(self.tokenizer.encode(image).cpu(), image.cpu(), [row])

    def sample(self, fields: Namespace, filling: tuple[Images, Tensor] | None = None) -> Images:
        """New images, or those of a filling: an image and which pixels, (H, W), bool, are new."""
        count, rows = fields.num_images, [*filling[0].rows] * fields.num_images if filling else []
        labels, captions = choose_texts(fields, self.vocabulary, rows, count)
        names = (f"{number:05}.png" for number in range(count))
        rows = [*map(Row, names, labels, *[[""] * count] * 2, captions)]
        values = {name: getattr(fields, name) for name in NUMBERS[:2]}
        options: dict[str, Any] = {"params": SamplingParams(**values), "seed": fields.seed}
        inputs = self.gpt, self.prefix(labels, captions)
        if filling is None:
            return self.decode(sampling.generate(*inputs, **options), rows)
        image, masks = filling[0], ~filling[1][None]
        known = known_positions(masks, self.vocabulary.latent_dim)[0]
        if known.all() or not known.any():
            much = "nothing" if known.all() else "all of the picture"
            raise UserError(f"{much} is brushed; brush over a part of it")
        grids = image.grids.repeat_interleave(count, dim=0)
        filled = self.decode(sampling.complete(*inputs, grids, known, **options), rows)
        blend = KnownPixels(masks, [PICTURE] * count).blend
        return filled._replace(pixels=blend(filled.pixels, image.pixels, torch.arange(count)))

    @torch.inference_mode()
    def likelihood(self, image: Images) -> tuple[Tensor, Tensor]:
        """Probabilities (n, K) of all indices at each token of one image; bits (h, w * depth)."""
        prefix = self.prefix([image.rows[0].label], [image.rows[0].caption]).to(self.device)
        nats = -self.gpt.logits(prefix, image.grids.to(self.device))[0].log_softmax(dim=1).cpu()
        bits = nats.gather(1, image.grids.view(-1, 1)) / math.log(2)
        return (-nats).exp(), bits.view_as(image.grids[0].flatten(1))

    def edit(self, image: Images, token: int, index: int) -> Images:
        """One image with another index as the token of this number."""
        grids = image.grids.clone()
        grids.view(-1)[token] = index
        return self.decode(grids, image.rows)

    def commands(self, images: Images, fields: Any = None, filling: Any = None) -> str:
        """The commands that make images of `sample` again, or edited ones, and what they read."""
        folder, own = cli.unused(Path(self.flags.output_dir, "result")), self.vocabulary
        codes = own.codebook_size, own.latent_dim, own.tokenizer_sha256, own.tokenizer_run_id
        meta, indices, lines = IndicesMeta(*codes, own.depth), folder / "indices", []
        decoding = ["--indexes_path", indices, "--model_dir", self.flags.model_dir]
        if fields is None:
            write_indices(indices, images.grids, images.rows, meta)
        else:
            words = ["--model_path", self.flags.model_path, "--precision", "fp32"]
            for name in NUMBERS[:3]:
                words += [f"--{name}", getattr(fields, name)]
            words += ["--labels", *fields.labels] if fields.labels else []
            words += [f"--prompt={prompt}" for prompt in fields.prompt]
            words += ["--num_images", 1 if filling else fields.num_images]
            if filling:
                known, mask, data = (folder / name for name in ("known", "mask.png", "data.csv"))
                row = filling[0].rows[0]._replace(image_path=PICTURE)
                write_indices(known, filling[0].grids, [row], meta)
                Image.fromarray((~filling[1]).numpy()).save(mask)
                figures.to_pil(filling[0].pixels[0]).save(folder / PICTURE)
                data.write_text(f"image_path\n{PICTURE}\n")
                words += ["--complete", known, "--mask", mask, "--variations", fields.num_images]
                decoding += ["--path_to_data", data]
            lines.append(cli.command("transformer_generation.py", *words, "--output_dir", indices))
        decoding += ["--output_dir", folder / "images"]
        return "\n".join([*lines, cli.command("vqvae/images_from_indexes.py", *decoding)])


def guarded(act: Callable[..., Any]) -> Callable[..., Any]:
    """`act`, but the page shows its UserErrors."""
    from gradio import Error

    @wraps(act)
    def call(*values: Any) -> Any:
        try:
            return act(*values)
        except UserError as error:
            raise Error(cli.printable(str(error)), print_exception=False) from error

    return call


def describe(play: Playground, images: Images, number: int = 0, token: int = 0) -> Any:
    """All that the page shows of the image of this number, with a chosen token."""
    from gradio import update

    one = slice(number, number + 1)
    image = Images(images.grids[one], images.pixels[one], images.rows[one])
    probabilities, bits = play.likelihood(image)
    row, column = divmod(token, bits.shape[1])
    most = probabilities[token].sort(descending=True, stable=True)
    pairs = zip(*(part.tolist() for part in most), strict=True)
    choices = [(f"{index}  ({share:.1%})", index) for share, index in pairs]
    title = f"Index in row {row + 1}, column {column + 1} ({bits[row, column]:.1f} bits)"
    choice = update(choices=choices, value=int(image.grids.view(-1)[token]), label=title)
    title = f"Bits per token, from {bits.min():.1f} (black) to {bits.max():.1f} (white)"
    picture = figures.enlarge(figures.to_pil(image.pixels[0]), SIDE)
    annotated = figures.tokens(image.pixels[0], image.grids[0].flatten(1), token)
    return image, token, picture, annotated, choice, update(value=figures.heat(bits), label=title)


def make_page(play: Playground) -> Any:
    """The page, a `gradio.Blocks`."""
    import gradio as gr

    show = partial(describe, play)

    def save(images: Images, *options: Any) -> tuple[Any, ...]:
        """The values of `results`."""
        pictures = (figures.enlarge(figures.to_pil(x), SMALL) for x in images.pixels)
        titles = (row.caption or row.label for row in images.rows)
        return images, [*zip(pictures, titles, strict=True)], play.commands(images, *options)

    def generate(*values: Any) -> tuple[Any, ...]:
        fields = read_fields(*values)
        images = play.sample(fields)
        return *save(images, fields), *show(images)

    def fill(image: Images, editor: dict[str, Any], *values: Any) -> tuple[Any, ...]:
        if image is None or not editor["layers"]:
            raise UserError("nothing is brushed; generate or upload an image, and brush over it")
        brushed = covered_pixels(editor["layers"][0], play.tokenizer.config.image_size)
        call = read_fields(*values), (image, brushed)
        return save(play.sample(*call), *call)

    def choose(images: Images, event: gr.SelectData) -> tuple[Any, ...]:
        return show(images, event.index)

    def click(image: Images, event: gr.SelectData) -> tuple[Any, ...]:
        indices = image.grids[0].flatten(1)
        x, y = (pixel // figures.token_side(indices) for pixel in event.index)
        return show(image, token=y * indices.shape[1] + x)

    def change(image: Images, token: int, index: int) -> tuple[Any, ...]:
        edited = play.edit(image, token, index)
        return *save(edited), *show(edited, token=token)

    def upload(file: str, *values: Any) -> tuple[Any, ...]:
        return show(play.open(file, read_fields(*values)))

    names, captions = [*play.vocabulary.class_names], play.vocabulary.captions is not None
    by_class = {"visible": bool(names), "info": "none: all of them"}
    guided = {"visible": bool(names) or captions, "step": 0.1}
    picture = partial(gr.Image, interactive=False, format="png", buttons=[], min_width=280)
    with gr.Blocks(title="Playground", analytics_enabled=False) as page:
        images, image, token = gr.State(), gr.State(), gr.State(0)
        with gr.Row():
            with gr.Column(min_width=280):
                fields = [
                    gr.Dropdown(names, label="Classes, in turn", multiselect=True, **by_class),
                    gr.Textbox("", label="Prompt", visible=captions),
                    gr.Slider(1, 8, 1, label="Guidance: follow class and prompt", **guided),
                    gr.Slider(0, 2, 1, label="Temperature: variety", step=0.05),
                    gr.Number(0, label="Seed", precision=0),
                    gr.Slider(1, 100, 16, step=1, label="Number of images"),
                ]
                start = gr.Button("Generate", variant="primary")
            with gr.Column(scale=2, min_width=280):
                options = {"allow_preview": False, "height": "auto", "object_fit": "contain"}
                options |= {"format": "png", "buttons": ["download_all"]}
                gallery = gr.Gallery(label="Click an image to edit it", **options)
                commands = gr.Textbox(label="Commands that make them again", buttons=["copy"])
        with gr.Row():
            with gr.Column(min_width=280):
                options = {"transforms": (), "layers": False, "sources": (), "type": "pil"}
                options["brush"] = gr.Brush(SIDE // 8, colors=["red"], color_mode="fixed")
                editor = gr.ImageEditor(show_label=False, **options)
                refill = gr.Button("Brush over a part, then fill it")
                file = gr.UploadButton("Upload an image", file_types=["image"])
            with gr.Column(min_width=280):
                tokens = picture(label="Click a token to change it")
                choice = gr.Dropdown([], label="Index")
            heat = picture(label="Bits per token")
        results, shown = [images, gallery, commands], [image, token, editor, tokens, choice, heat]
        start.click(guarded(generate), fields, [*results, *shown])
        refill.click(guarded(fill), [image, editor, *fields], results)
        gallery.select(guarded(choose), images, shown)
        tokens.select(guarded(click), image, shown)
        choice.select(guarded(change), [image, token, choice], [*results, *shown])
        file.upload(guarded(upload), [file, *fields], shown)
    return page


def main(arguments: Namespace) -> None:
    with cli.user_error("the playground needs Gradio; run: pip install gradio", ImportError):
        from gradio import themes
    device = distributed.pick_device("auto")
    gpt = load_model(arguments.model_path, GPT, device)
    tokenizer = load_model(arguments.model_dir, VQVAE, device)
    vocabulary = read_vocabulary(gpt.folder)
    vocabulary.check_model(gpt.model.config, gpt.folder)
    vocabulary.check_tokenizer(tokenizer.sha256, tokenizer.folder, tokenizer.model.config)
    if vocabulary.condition is not None:
        text = f"the GPT in {arguments.model_path} takes conditions, which the playground lacks"
        raise UserError(f"{text}; use transformer_generation.py --conditions")
    page = make_page(Playground(gpt.model, tokenizer.model, vocabulary, device, arguments))
    options = {"server_name": arguments.host, "server_port": arguments.port, "footer_links": []}
    theme = themes.Default(font="sans-serif", font_mono="monospace")  # nothing is downloaded
    cli.build_or_error(page.launch, **options, theme=theme, css=CSS, share=False)


def make_parser() -> ArgumentParser:
    parser = cli.make_parser(__doc__)
    add = parser.add_argument
    add("--model_path", required=True, help="GPT: a folder, or runs:/<run id>/checkpoints")
    add("--model_dir", required=True, help="its tokenizer, likewise")
    add("--output_dir", default="outputs/playground", help="what the shown commands read")
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: for other machines too")
    add("--port", type=cli.positive, default=7860, help="port to listen on")
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
