"""Images at URLs: what --path_to_data may name beside local files."""

import glob
import os
import re

from utils import addresses
from utils.data.finding import expand_braces
from utils.data.sources.csv import read_table


def fetch(address: str) -> str:
    """The local path, pattern or list in the place of one with URLs, which are downloaded.

    s3://bucket/{000..010}.tar names these files; a URL that ends in .csv, the images that it lists
    as well, with paths below its folder.
    """
    if "://" not in address:
        return address
    parts = re.findall(r"(?:\{(?:[^{}]|\{[^{}]*\})*\}|[^,{}])+", address)  # braces may have commas
    return ",".join(map(_fetch_part, parts))


def _fetch_part(address: str) -> str:
    if not addresses.URL.match(address):
        return address
    magic = r"\{" if address.startswith("http") else r"[{*?\[]"
    root = re.split(magic, address.rstrip("/"))[0].rpartition("/")[0]
    names = []
    for url in expand_braces(address.rstrip("/")):
        names.append(url[len(root) + 1 :])
        if addresses.local_name(root, url).endswith(".csv") and not glob.has_magic(url):
            columns = read_table(addresses.fetch(url))[1].columns
            images = sorted({*columns["image_path"], *columns["condition_path"]} - {""})
            beside = os.path.dirname(names[-1])
            names += [os.path.normpath(os.path.join(beside, name)) for name in images]
    folder = addresses.fetch_files(root, tuple(names))
    return str(folder / addresses.local_name(root, address.rstrip("/")[len(root) + 1 :]))
