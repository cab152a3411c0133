"""Bring MLflow up to date with an output folder: ask what it has, and send only the rest."""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from utils import provenance
from utils.tracking import journal, links, metrics_log, picture_table, registry, store

Entry = dict[str, Any]


def replay(client: Any, output_dir: Path) -> Counter[str]:
    """Send what the runs of an output folder logged and MLflow does not have.

    Args:
        client: of MLflow.
        output_dir: with mlflow.jsonl and metrics.jsonl; of no training that still runs.

    Returns:
        How many of each kind were sent.

    Raises:
        UserError: no such folder, or a run that this MLflow store does not have.
    """
    entries = journal.read_lines(output_dir / journal.FILE)
    numbers = output_dir / journal.METRICS
    lines = journal.read_lines(numbers) if numbers.is_file() else []
    sent: Counter[str] = Counter()
    for run_id, logged, measured in _by_run(entries, lines):
        run = store.existing_run(client, run_id)
        sent["metrics"] += _send_metrics(client, run_id, measured)
        sent["pictures"] += _send_pictures(client, run_id, output_dir, logged)
        sent["files"] += _send_files(client, run_id, _files(output_dir, logged))
        sent["tables"] += _send_tables(client, run_id, output_dir, logged)
        sent["links"] += _send_links(client, run, logged)
        sent["models"] += _send_models(client, run, output_dir, logged)
        status = logged[-1].get("status") if logged else None
        if status not in (None, run.info.status):
            client.set_terminated(run_id, status)
            sent["status"] += 1
    return sent


def _by_run(
    entries: list[Entry], lines: list[Entry]
) -> Iterator[tuple[str, list[Entry], list[Entry]]]:
    """Each run of an output folder, with its part of both files."""
    runs: dict[str, tuple[list[Entry], list[Entry]]] = {}
    current = None
    marked = [(entry, False) for entry in entries] + [(line, True) for line in lines]
    for entry, measured in sorted(marked, key=lambda pair: pair[0]["time"]):
        if "run_id" in entry:
            current = runs.setdefault(entry["run_id"], ([], []))
        elif current is not None:
            current[measured].append(entry)
    for run_id, (logged, measured) in runs.items():
        yield run_id, logged, measured


def _milliseconds(entry: Entry) -> int:
    return int(entry["time"] * 1000)


def _send_metrics(client: Any, run_id: str, lines: list[Entry]) -> int:
    found = [
        (key, value, _milliseconds(line), line["step"])
        for line in lines
        for key, value in line.items()
        if key not in ("time", "step")
    ]
    there = {
        (key, one.timestamp, one.step)
        for key in sorted({one[0] for one in found})
        for one in client.get_metric_history(run_id, key)
    }
    # A training that went on after a crash logs the numbers of some steps at another time again.
    again = {(key, step) for key, _, step in there if key.startswith(metrics_log.OF_TRAININGS)}
    missing = [
        one for one in found if (one[0], *one[2:]) not in there and (one[0], one[3]) not in again
    ]
    store.send_numbers(client, run_id, missing)
    return len(missing)


def _send_pictures(client: Any, run_id: str, output_dir: Path, entries: list[Entry]) -> int:
    there = store.pictures(client, run_id)
    count = 0
    for entry in (one for one in entries if "picture" in one):
        which = entry["key"], entry["step"], _milliseconds(entry)
        path = output_dir / journal.PICTURES / Path(entry["picture"]).name
        if len(there.get(which, ())) < store.PICTURE_FILES and path.is_file():
            store.send_picture(client, run_id, path, *which, check=True)
            count += 1
    return count


def _send_tables(client: Any, run_id: str, output_dir: Path, entries: list[Entry]) -> int:
    folder = picture_table.FOLDER
    names = sorted({entry["table"] for entry in entries if "table" in entry})
    files = {output_dir / folder / f"{name}.json": name for name in names}
    there = {Path(one.path).name for one in client.list_artifacts(run_id, folder)} if files else ()
    missing = [name for file, name in files.items() if file.is_file() and file.name not in there]
    for name in missing:
        store.send_table(client, run_id, output_dir, name)
    return len(missing)


def _send_links(client: Any, run: Any, entries: list[Entry]) -> int:
    """Link the stages that are not, and say what those of trainings read."""
    lineages = [provenance.parse(entry["lineage"]) for entry in entries if "lineage" in entry]
    missing = [lineage for lineage in lineages if not links.linked(client, lineage)]
    for lineage in missing:
        if run.data.tags.get("stage") == lineage[-1].name:
            registry.log_inputs(client, lineage)
        links.link(client, lineage)
    return len(missing)


def _send_models(client: Any, run: Any, output_dir: Path, entries: list[Entry]) -> int:
    """Log the models that are not, and register those that were to be."""
    found = [entry for entry in entries if "model" in entry]
    missing = found if not registry.newest_model(run) else []
    for entry in missing:
        folder = output_dir / entry["model"]
        if not folder.resolve().is_relative_to(output_dir.resolve()) or not folder.is_dir():
            continue
        values = entry["values"]
        where = client, run.info.run_id
        registry.log_model(*where, folder, values, entry["time"], entry["step"])
        if entry["register"]:
            criterion = registry.Criterion(next(iter(values)), entry["lower"])
            print(registry.register(*where, entry["register"], criterion))
    return len(missing)


def _send_files(client: Any, run_id: str, files: set[tuple[Path, str]]) -> int:
    """Send each file, into its folder, that is not there at its size."""

    @cache
    def there(folder: str) -> dict[str, int]:
        listed = client.list_artifacts(run_id, folder or None)
        return {Path(one.path).name: one.file_size for one in listed}

    missing = [x for x in sorted(files) if there(x[1]).get(x[0].name) != x[0].stat().st_size]
    for file, folder in missing:
        client.log_artifact(run_id, str(file), folder or None)
    return len(missing)


def _files(output_dir: Path, entries: list[Entry]) -> set[tuple[Path, str]]:
    """Every file that was logged and is still there, and its folder among the run's artifacts.

    What lies outside of the output folder stays where it is, whoever wrote the journal.
    """
    home = output_dir.resolve()
    found = set()
    for entry in entries:
        if "file" in entry:
            found.add((output_dir / entry["file"], entry["name"]))
        elif "folder" in entry:
            top = output_dir / entry["folder"]
            for file in top.rglob("*"):
                folder = Path(entry["name"]) / file.parent.relative_to(top)
                found.add((file, folder.as_posix()))
    return {x for x in found if x[0].is_file() and x[0].resolve().is_relative_to(home)}
