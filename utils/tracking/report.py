"""report.html: the results of a training on one page, which needs no server and no other file."""

import base64
import html
import math
import re
from collections import defaultdict
from pathlib import Path
from string import Template

from utils import provenance
from utils.provenance import LINEAGE
from utils.tracking.sync import read_metrics

FILE = "report.html"
MOST_STEPS, MOST_POINTS = 24, 240  # of a slider, of a curve
BASELINES = ("unigram_", "bigram_")
COLOURS = ("val", "train", "unigram", "bigram")  # of the curves, see .s0 to .s3
WIDTH, HEIGHT, LEFT, BOTTOM = 360, 200, 54, 22  # of a chart, and its margins

Series = dict[str, list[tuple[int, float]]]  # section -> (step, value), in order


def write(home: Path) -> Path:
    """Write report.html into the output folder of a training; parts without data are left out.

    An OSError if a file cannot be read or written, a UserError if the lineage is damaged.
    """
    metrics = series_of(home)
    lineage = provenance.from_json(text_of(home / LINEAGE) or "[]", str(home / LINEAGE))
    facts = f"{lineage[-1].name} · run {lineage[-1].run_id}" if lineage else ""
    machine = {name: metrics.pop(name) for name in list(metrics) if "system" in metrics[name]}
    parts = [
        summary(metrics),
        cards("<h2>Pictures</h2>", pictures(home)),
        cards("<h2>Curves</h2>", charts(metrics)),
        preformatted("<h2>How it was made</h2>", provenance.describe(lineage)),
        details("Settings", preformatted("", text_of(home / "config.json"))),
        details("The machine", cards("", charts(machine))),
    ]
    template = Template(Path(__file__).with_name(FILE).read_text(encoding="utf-8"))
    title = html.escape(home.resolve().name)
    body = "\n".join(filter(None, parts))
    staging = home / f"{FILE}.tmp"
    page = template.substitute(title=title, subtitle=html.escape(facts), body=body)
    staging.write_text(page, encoding="utf-8")
    return staging.rename(home / FILE)


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def series_of(home: Path) -> dict[str, Series]:
    """name -> section -> points of a metrics.jsonl; a baseline is a section of its metric."""
    found: dict[str, Series] = defaultdict(lambda: defaultdict(list))
    for line in read_metrics(home):
        for key, value in line.values.items():
            part, _, name = key.partition("/")
            for baseline in BASELINES:
                if name.startswith(baseline):
                    part, name = baseline.strip("_"), name.removeprefix(baseline)
            if math.isfinite(value):
                found[name][part].append((line.step, value))
    return found


def summary(metrics: dict[str, Series]) -> str:
    """The last value of each validation metric."""
    values = {name: parts["val"][-1][1] for name, parts in metrics.items() if "val" in parts}
    rows = [f"<div><dt>{words(n)}</dt><dd>{number(v)}</dd></div>" for n, v in values.items()]
    return f"<dl>{''.join(rows)}</dl>" if rows else ""


def pictures(home: Path) -> list[str]:
    """A card for each logged picture, with a slider if it was logged at several steps."""
    found: dict[str, list[tuple[int, Path]]] = defaultdict(list)
    places = ("pictures", "*.pictures", "*/pictures", "evaluation/*/pictures")
    for path in sorted(path for place in places for path in home.glob(f"{place}/*.png")):
        if match := re.fullmatch(r"(?:pictures-)?(.+)-(\d{8})", path.stem):
            place = path.parent.relative_to(home).as_posix().removesuffix("pictures")
            part = re.sub("[./]", " ", place.removeprefix("evaluation/"))
            found[part + match[1]].append((int(match[2]), path))
    names = sorted(found, key=lambda name: (len(found[name]) == 1, name))
    return [picture(words(name), thinned(found[name], MOST_STEPS)) for name in names]


def picture(title: str, steps: list[tuple[int, Path]]) -> str:
    """A card of one picture: the last of its steps, and a slider to the others."""
    last, step = len(steps) - 1, f"step {steps[-1][0]}"
    images = [
        f'<img data-step="{step}" alt="{title} at step {step}"{" hidden" * (number < last)} '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        for number, (step, path) in enumerate(steps)
    ]
    slider = (
        f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step of {title}" '
        f'aria-valuetext="{step}"><figcaption><output>{step}</output></figcaption>'
    )
    start = f'<figure class="card"{" data-slider" * bool(last)}><h3>{title}</h3>'
    return f"{start}{''.join(images)}{slider * bool(last)}</figure>"


def charts(metrics: dict[str, Series]) -> list[str]:
    """A card for each metric that has a curve, those of the validation data first."""
    found = [name for name, one in metrics.items() if max(map(len, one.values())) > 1]
    found.sort(key=lambda name: ("val" not in metrics[name], name))
    return [chart(words(name), metrics[name]) for name in found]


def chart(title: str, series: Series) -> str:
    """An SVG of a metric over the steps, one curve for each section."""
    steps, values = zip(*(point for one in series.values() for point in one), strict=True)
    (left, right), (low, high) = span(steps), span(values)
    logarithmic = low > 0 and high / low > 50
    shape = math.log if logarithmic else float

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - left) / (right - left)
        up = (shape(value) - shape(low)) / (shape(high) - shape(low))
        return LEFT + across * (WIDTH - LEFT - 6), (HEIGHT - BOTTOM) - up * (HEIGHT - BOTTOM - 10)

    lines, keys = [], []
    for part in (0, 1 / 3, 2 / 3, 1):
        value = low * (high / low) ** part if logarithmic else low + (high - low) * part
        x, y = place(left, value)
        lines.append(f'<line class="grid" x1="{x}" x2="{WIDTH - 6}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{x - 5}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for step, x, anchor in ((left, LEFT, "start"), (right, WIDTH - 6, "end")):
        lines.append(f'<text x="{x}" y="{HEIGHT - 5}" text-anchor="{anchor}">{step:,.0f}</text>')
    for name, one in series.items():
        colour = COLOURS.index(name) if name in COLOURS else 0
        path = " L".join("{:.1f} {:.1f}".format(*place(*p)) for p in thinned(one, MOST_POINTS))
        lines.append(f'<path class="s{colour}" d="M{path}"/>')
        keys.append(f'<span class="key s{colour}">{words(name)} {number(one[-1][1])}</span>')
    label = f'viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{title} over steps"'
    return (
        f'<figure class="card"><h3>{title}</h3><svg {label}>{"".join(lines)}</svg>'
        f"<figcaption>{''.join(keys)}</figcaption></figure>"
    )


def cards(title: str, parts: list[str]) -> str:
    return f'{title}<div class="cards">{"".join(parts)}</div>' if parts else ""


def preformatted(title: str, text: str) -> str:
    return f"{title}<pre>{html.escape(text.strip())}</pre>" if text else ""


def details(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>" if content else ""


def words(name: str) -> str:
    return html.escape(re.sub("[_-]", " ", name))


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def span(values: tuple[float, ...]) -> tuple[float, float]:
    """The smallest and the largest value, made different if they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def thinned(items: list, most: int) -> list:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]
