"""Embeddings of captions by a text encoder of `transformers`, such as T5 or CLIP: an .npy file."""

import argparse
from pathlib import Path

import numpy as np
import torch

from utils import addresses, cli, distributed
from utils.data.conditioning import read_prompts
from utils.data.indices import MANIFEST
from utils.data.sources.csv import read_table
from utils.progress import ProgressBar


@torch.inference_mode()
def main(flags: argparse.Namespace) -> None:
    texts, file = read_prompts(flags.prompt or []), flags.output_file
    if not texts:
        path = addresses.fetch(flags.path_to_data)
        table = path / MANIFEST if path.is_dir() else path
        texts = [row.caption for row in read_table(table)[1]]
    if not any(texts):
        raise cli.UserError(f"{flags.path_to_data or '--prompt'} has no captions; add some")
    text = f"cannot load the text encoder {flags.encoder}: %s; give its folder, and pip install "
    with cli.user_error(text + "transformers", Exception):  # not installed, offline, unknown, ...
        from transformers import AutoModel, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(flags.encoder)
        model = AutoModel.from_pretrained(flags.encoder)
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    encoder = getattr(encoder, "text_model", encoder).eval()
    encoder.to(distributed.pick_device(flags.device))
    length = min(flags.length, tokenizer.model_max_length)
    options = {"padding": "max_length", "truncation": True, "max_length": length}
    shape, partial = (len(texts), length, encoder.config.hidden_size), file.with_suffix(".tmp")
    vectors = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
    for start in ProgressBar(range(0, len(texts), flags.batch_size), unit=" batches"):
        part = slice(start, start + flags.batch_size)
        inputs = tokenizer(texts[part], **options, return_tensors="pt").to(encoder.device)
        states = encoder(**inputs).last_hidden_state * inputs["attention_mask"][..., None]
        vectors[part] = states.cpu().numpy()
    partial.replace(file)
    print(f"vectors {shape} in {file}; use them by --embeddings {file}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m utils.embeddings")
    add = parser.add_argument
    add("--encoder", required=True, help="folder or name, as google/t5-v1_1-base")
    texts = parser.add_mutually_exclusive_group(required=True)
    texts.add_argument("--path_to_data", help="indices folder or CSV: its captions, for a training")
    texts.add_argument("--prompt", action="append", help="repeatable; @FILE: the lines of a file")
    add("--length", type=cli.positive, default=32, metavar="L", help="text tokens; the rest is cut")
    add("--output_file", type=Path, required=True, metavar="FILE.npy", help="(N, L, D), float16")
    cli.add_inference_flags(parser, batch_size=64)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
