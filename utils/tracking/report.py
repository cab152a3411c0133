"""report.html: the results of a training on one page, which needs no server and no other file."""

import base64
import html
import math
import re
import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from string import Template

from utils import provenance
from utils.provenance import Lineage
from utils.tracking.store import LINEAGE
from utils.tracking.sync import read_metrics

FILE = "report.html"
MOST_STEPS, MOST_POINTS = 24, 240  # of a slider, of a curve
BASELINES = ("unigram_", "bigram_")
COLOURS = ("val", "train", "unigram", "bigram")  # of the curves, see .s0 to .s3
WIDTH, HEIGHT, LEFT, BOTTOM = 360, 200, 54, 22  # of a chart, and its margins

Series = dict[str, list[tuple[int, float]]]  # section -> (step, value), in order

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --back: #f6f7f9; --card: #fff; --text: #1b2027; --soft: #5d6774;
  --line: #dde2e8; --a: #1f6fb4; --b: #d9480f; --c: #2b8a3e; --d: #7048b6; }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --card: #1d2126; --text: #e6e9ed;
  --soft: #9aa4b1; --line: #343b44; --a: #6cb2f0; --b: #ff9a62; --c: #7fd193; --d: #b9a0ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--back);
  color: var(--text); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0; font-size: 1.6rem; overflow-wrap: anywhere; }
h2 { margin: 2.2rem 0 .8rem; font-size: 1.15rem; }
h3 { margin: 0 0 .4rem; font-size: .95rem; font-weight: 600; }
p, figcaption { color: var(--soft); margin: .2rem 0; }
.cards { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
.card { margin: 0; padding: 1rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
.card img { display: block; width: 100%; height: auto; image-rendering: pixelated; }
.card img[hidden] { display: none; }
input[type=range] { width: 100%; margin: .8rem 0 0; accent-color: var(--a); min-height: 1.5rem; }
dl { display: grid; gap: .8rem; margin: 1.2rem 0 0;
  grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
dt { color: var(--soft); font-size: .82rem; overflow-wrap: anywhere; }
dd { margin: 0; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; font-size: 11px; }
svg text { fill: var(--soft); } svg .grid { stroke: var(--line); }
svg path { fill: none; stroke-width: 1.8; vector-effect: non-scaling-stroke; }
.s0 { stroke: var(--a); color: var(--a); } .s1 { stroke: var(--b); color: var(--b); }
.s2 { stroke: var(--c); color: var(--c); } .s3 { stroke: var(--d); color: var(--d); }
.key { display: inline-block; margin-right: 1rem; font-size: .82rem; }
pre { margin: .4rem 0 0; padding: .7rem; background: var(--back); border-radius: .4rem;
  font-size: .82rem; white-space: pre-wrap; overflow-wrap: anywhere; }
ol { padding-left: 1.3rem; } li { margin: 0 0 1rem; } li p { font-size: .82rem; }
summary { cursor: pointer; margin-top: 1rem; color: var(--soft); }
</style>
<h1>$title</h1>
<p>$subtitle</p>
$body
<script>
for (const card of document.querySelectorAll("[data-slider]")) {
  const range = card.querySelector("input"), images = card.querySelectorAll("img");
  range.addEventListener("input", () => {
    images.forEach((image, number) => { image.hidden = number !== Number(range.value); });
    const step = images[range.value].dataset.step;
    card.querySelector("output").textContent = "step " + step;
    range.setAttribute("aria-valuetext", "step " + step);
  });
}
</script>
</html>
""")


def write(home: Path) -> Path:
    """Write report.html into the output folder of a training; parts without data are left out.

    Raises:
        OSError: a file cannot be read or written.
        UserError, ValueError: the lineage is damaged.
    """
    metrics = series_of(home)
    lineage = provenance.from_json(_text(home / LINEAGE) or "[]", str(home / LINEAGE))
    config = _text(home / "config.json")
    facts = [lineage[-1].name, f"run {lineage[-1].run_id}"] if lineage else []
    parts = [
        summary(metrics),
        section("Pictures", pictures(home)),
        section("Curves", charts({k: v for k, v in metrics.items() if "system" not in v})),
        commands(lineage),
        details("Settings", f"<pre>{html.escape(config)}</pre>" if config else ""),
        details("The machine", cards(charts({k: v for k, v in metrics.items() if "system" in v}))),
    ]
    page = PAGE.substitute(
        title=html.escape(home.resolve().name),
        subtitle=html.escape(" · ".join(facts)),
        body="\n".join(filter(None, parts)),
    )
    staging = home / f"{FILE}.tmp"
    staging.write_text(page, encoding="utf-8")
    return staging.rename(home / FILE)


def _text(path: Path) -> str:
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
    found = dict(sorted(found.items(), key=lambda item: (len(item[1]) == 1, item[0])))
    return [picture(name, steps) for name, steps in found.items()]


def picture(name: str, steps: list[tuple[int, Path]]) -> str:
    """A card of one picture: the last of its steps, and a slider to the others."""
    steps = thinned(steps, MOST_STEPS)
    images = []
    for count, (step, path) in enumerate(steps, 1):
        data = base64.b64encode(path.read_bytes()).decode()
        images.append(
            f'<img data-step="{step}" alt="{words(name)} at step {step}"'
            f'{"" if count == len(steps) else " hidden"} src="data:image/png;base64,{data}">'
        )
    last = len(steps) - 1
    title = f"<h3>{words(name)}</h3>"
    if not last:
        return f'<figure class="card">{title}{images[0]}</figure>'
    return (
        f'<figure class="card" data-slider>{title}{"".join(images)}<input type="range" min="0" '
        f'max="{last}" value="{last}" aria-label="step of {words(name)}" '
        f'aria-valuetext="step {steps[-1][0]}"><figcaption><output>step {steps[-1][0]}</output>'
        "</figcaption></figure>"
    )


def charts(metrics: dict[str, Series]) -> list[str]:
    """A card for each metric that has a curve."""
    drawn = {n: s for n, s in metrics.items() if any(len(points) > 1 for points in s.values())}
    # Metrics of the validation data come first: they measure how good the model is.
    names = sorted(drawn, key=lambda name: ("val" not in drawn[name], name))
    return [chart(name, drawn[name]) for name in names]


def chart(name: str, series: Series) -> str:
    """An SVG of a metric over the steps, one curve for each section."""
    points = [point for one in series.values() for point in one]
    (left, right), (low, high) = (span(values) for values in zip(*points, strict=True))
    logarithmic = low > 0 and high / low > 50
    shape = math.log if logarithmic else float

    def place(step: float, value: float) -> tuple[float, float]:
        across = (step - left) / (right - left)
        up = (shape(value) - shape(low)) / (shape(high) - shape(low))
        return LEFT + across * (WIDTH - LEFT - 6), (HEIGHT - BOTTOM) - up * (HEIGHT - BOTTOM - 10)

    lines, keys = [], []
    for part in range(4):
        value = low * (high / low) ** (part / 3) if logarithmic else low + (high - low) * part / 3
        x, y = place(left, value)
        lines.append(f'<line class="grid" x1="{x}" x2="{WIDTH - 6}" y1="{y:.1f}" y2="{y:.1f}"/>')
        lines.append(f'<text x="{x - 5}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for step, anchor in ((left, "start"), (right, "end")):
        x, _ = place(step, low)
        lines.append(f'<text x="{x}" y="{HEIGHT - 5}" text-anchor="{anchor}">{step:,.0f}</text>')
    for title, one in series.items():
        colour = COLOURS.index(title) if title in COLOURS else 0
        path = " L".join("{:.1f} {:.1f}".format(*place(*p)) for p in thinned(one, MOST_POINTS))
        lines.append(f'<path class="s{colour}" d="M{path}"/>')
        keys.append(f'<span class="key s{colour}">{words(title)} {number(one[-1][1])}</span>')
    label = f'role="img" aria-label="{words(name)} over steps"'
    return (
        f'<figure class="card"><h3>{words(name)}</h3><svg viewBox="0 0 {WIDTH} {HEIGHT}" {label}>'
        f"{''.join(lines)}</svg><figcaption>{''.join(keys)}</figcaption></figure>"
    )


def commands(lineage: Lineage) -> str:
    """The commands of the lineage, from the data on, with commits and digests."""
    items = []
    for stage in lineage:
        read = ", ".join(f"{path} ({digest[:12]})" for path, digest in stage.inputs.items())
        facts = (
            f"commit {stage.commit[:12]}{'+' * stage.commit.endswith('+')}",
            f"PyTorch {stage.torch}, threads: {stage.threads}",
            f"read {read}" if read else "",
        )
        name, command = html.escape(stage.name), html.escape(wrapped(stage.command))
        below = html.escape(" · ".join(filter(None, facts)))
        items.append(f"<li><strong>{name}</strong><pre>{command}</pre><p>{below}</p></li>")
    return f"<h2>How it was made</h2><ol>{''.join(items)}</ol>" if items else ""


def wrapped(command: str) -> str:
    """A command with one flag per line, still one command."""
    lines: list[str] = []
    for word in shlex.split(command):
        if word.startswith("--") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += f" {shlex.quote(word)}"
    return " \\\n    ".join(lines)


def section(title: str, parts: list[str]) -> str:
    return f"<h2>{title}</h2>{cards(parts)}" if parts else ""


def cards(parts: list[str]) -> str:
    return f'<div class="cards">{"".join(parts)}</div>' if parts else ""


def details(title: str, content: str) -> str:
    return f"<details><summary>{title}</summary>{content}</details>" if content else ""


def words(name: str) -> str:
    return html.escape(name.replace("_", " ").replace("-", " "))


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def span(values: Sequence[float]) -> tuple[float, float]:
    """The smallest and the largest value, made different if they are equal."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2)


def thinned(items: list, most: int) -> list:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if len(items) <= most:
        return items
    return [items[round(n * (len(items) - 1) / (most - 1))] for n in range(most)]
