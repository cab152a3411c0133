"""Bring MLflow up to date with an output folder: ask what it has, and send only the rest."""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from utils import provenance
from utils.tracking import gateway, journal, links, metrics_log, picture_table, registry, store
from utils.tracking.journal import Line


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
    sent: Counter[str] = Counter()
    for run_id, entries, lines in _by_run(journal.read(output_dir), metrics_log.read(output_dir)):
        run = gateway.existing_run(client, run_id)
        sent["metrics"] += _send_metrics(client, run_id, lines)
        sent["pictures"] += _send_pictures(client, run_id, output_dir, entries)
        sent["files"] += _send_files(client, run_id, _files(output_dir, entries))
        sent["tables"] += _send_tables(client, run_id, output_dir, entries)
        sent["links"] += _send_links(client, run, entries)
        sent["models"] += _send_models(client, run, output_dir, entries)
        status = next((one["status"] for one in reversed(entries) if "status" in one), "RUNNING")
        if status not in ("RUNNING", run.info.status):
            client.set_terminated(run_id, status)
            sent["status"] += 1
    return sent


def _by_run(entries: list[Line], lines: list[Line]) -> Iterator[tuple[str, list[Line], list[Line]]]:
    """Each run of an output folder, with its entries of the journals and its lines of numbers."""
    for run_id in dict.fromkeys(one["run_id"] for one in (*entries, *lines)):
        yield (
            run_id,
            [one for one in entries if one["run_id"] == run_id],
            [one for one in lines if one["run_id"] == run_id],
        )


def _milliseconds(entry: Line) -> int:
    return int(entry["time"] * 1000)


def _send_metrics(client: Any, run_id: str, lines: list[Line]) -> int:
    found = [
        gateway.Point(key, value, _milliseconds(line), line["step"])
        for line in lines
        for key, value in metrics_log.numbers(line).items()
    ]
    there = {
        (key, one.timestamp, one.step)
        for key in sorted({one.key for one in found})
        for one in client.get_metric_history(run_id, key)
    }
    # A training that went on after a crash logs the numbers of some steps at another time again.
    again = {(key, step) for key, _, step in there if key.startswith(metrics_log.OF_TRAININGS)}
    missing = [
        one
        for one in found
        if (one.key, one.when, one.step) not in there and (one.key, one.step) not in again
    ]
    gateway.send_points(client, run_id, missing)
    return len(missing)


def _send_pictures(client: Any, run_id: str, output_dir: Path, entries: list[Line]) -> int:
    there = store.pictures(client, run_id)
    count = 0
    for entry in (one for one in entries if "picture" in one):
        which = entry["key"], entry["step"], _milliseconds(entry)
        path = output_dir / entry["picture"]
        if len(there.get(which, ())) < store.PICTURE_FILES and _inside(path, output_dir):
            store.send_picture(client, run_id, path, *which, check=True)
            count += 1
    return count


def _send_tables(client: Any, run_id: str, output_dir: Path, entries: list[Line]) -> int:
    home = output_dir / picture_table.FOLDER
    names = sorted({entry["table"] for entry in entries if "table" in entry})
    files = {home / f"{name}.json": name for name in names}
    listed = client.list_artifacts(run_id, picture_table.FOLDER) if files else ()
    there = {Path(one.path).name for one in listed}
    missing = [
        name
        for file, name in files.items()
        if file.name not in there and _inside(file, home) and _inside(home / name, home)
    ]
    for name in missing:
        store.send_table(client, run_id, output_dir, name)
    return len(missing)


def _send_links(client: Any, run: Any, entries: list[Line]) -> int:
    """Link the stages that are not, and say what those of trainings read."""
    lineages = [provenance.parse(entry["lineage"]) for entry in entries if "lineage" in entry]
    missing = [lineage for lineage in lineages if not links.linked(client, lineage)]
    for lineage in missing:
        if run.data.tags.get("stage") == lineage[-1].name:
            registry.log_inputs(client, lineage)
        links.link(client, lineage)
    return len(missing)


def _send_models(client: Any, run: Any, output_dir: Path, entries: list[Line]) -> int:
    """Log the models that are not, and register those that were to be."""
    found = [entry for entry in entries if "model" in entry]
    missing = found if not registry.newest_model(run) else []
    for entry in missing:
        folder = output_dir / entry["model"]
        if not _inside(folder, output_dir):
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


def _files(output_dir: Path, entries: list[Line]) -> set[tuple[Path, str]]:
    """Every file that was logged and is still there, and its folder among the run's artifacts.

    What lies outside of the output folder stays where it is, whoever wrote the journal.
    """
    found = set()
    for entry in entries:
        if "file" in entry:
            found.add((output_dir / entry["file"], entry["name"]))
        elif "folder" in entry:
            top = output_dir / entry["folder"]
            for file in top.rglob("*"):
                folder = Path(entry["name"]) / file.parent.relative_to(top)
                found.add((file, folder.as_posix()))
    return {x for x in found if x[0].is_file() and _inside(x[0], output_dir)}


def _inside(path: Path, home: Path) -> bool:
    """Whether a file or folder is there and, links followed, it and all in it are in `home`."""
    found = [one.resolve() for one in (path, *path.rglob("*"))]
    return path.exists() and all(one.is_relative_to(home.resolve()) for one in found)
