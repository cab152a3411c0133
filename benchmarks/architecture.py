"""Draw the packages, their files and their imports, as they are.

python -m benchmarks.architecture readme_images/architecture.png
"""

import sys
from pathlib import Path

from benchmarks.reading import ENTRY_POINTS, import_graph, reach, read_sources

# Where each box of the picture stands: its centre, in inches.
BOXES = {
    "scripts": (5.6, 8.2),
    "utils/tracking": (1.7, 6.2),
    "utils/training": (4.6, 6.2),
    "utils/evaluation": (4.6, 4.4),
    "utils/data": (4.6, 2.7),
    "utils": (3.2, 0.9),
    "vqvae": (7.6, 4.6),
    "transformer": (10.7, 4.6),
}


def box_of(path: str) -> str:
    """The box in which the picture shows a file."""
    if path in ENTRY_POINTS:
        return "scripts"
    parts = path.split("/")
    return "/".join(parts[:2]) if parts[0] == "utils" and len(parts) > 2 else parts[0]


def draw(file: Path) -> None:
    """Draw the packages with their files, and arrows from each to those that it imports.

    An arrow is left out where a way over other arrows leads to the same box.
    """
    from matplotlib.figure import Figure

    sources = read_sources()
    imported: dict[str, set[str]] = {name: set() for name in BOXES}
    for path, found in import_graph(sources).items():
        if not path.endswith("__init__.py"):
            imported[box_of(path)] |= {box_of(other) for other in found} - {box_of(path)}
    figure = Figure(figsize=(12, 9.2), layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 12), ylim=(0, 9.2))
    axes.axis("off")
    style = {"boxstyle": "round,pad=0.5", "facecolor": "#eef3fa", "edgecolor": "#5577aa"}
    boxes = {}
    for name, (x, y) in BOXES.items():
        files = [path for path in sorted(sources) if box_of(path) == name]
        total = sum(sources[path].lines for path in files)
        labels = [
            f"{path.removeprefix(f'{name}/').removesuffix('.py')} {sources[path].lines}"
            for path in files
            if not path.endswith("__init__.py")
        ]
        in_a_line = 4 if name == "scripts" else 2
        parts = [labels[n : n + in_a_line] for n in range(0, len(labels), in_a_line)]
        text = "\n".join([f"{name}: {total:,} lines", *("   ".join(part) for part in parts)])
        label = axes.text(x, y, text, ha="center", va="center", fontsize=9, bbox=style)
        boxes[name] = label.get_bbox_patch()
    for start, ends in imported.items():
        for end in ends:
            if not any(end in reach(other, imported) for other in ends - {end}):
                arrow = {"arrowstyle": "-|>", "color": "#5577aa", "lw": 1.3}
                arrow |= {"patchA": boxes[start], "patchB": boxes[end], "shrinkB": 3}
                axes.annotate("", BOXES[end], BOXES[start], arrowprops=arrow, zorder=0)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
