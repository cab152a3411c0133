"""Send MLflow what it missed of a training while it was away.

python -m utils.tracking --replay OUTPUT_DIR
"""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from utils import addresses, cli
from utils.tracking import store, sync


def replay(client: Any, home: Path) -> Counter[str]:
    """Send what the runs of an output folder logged and MLflow does not have; count it by kind.

    Files outside of the folder are not sent: the log may be a stranger's. A UserError if there is
    no such folder, or its run is not in this MLflow store.
    """
    sent: Counter[str] = Counter()
    errors: list[Exception] = []
    events, lines = sync.read_events(home), sync.read_metrics(home)
    if not events:
        raise cli.UserError(f"{home} has no {sync.EVENTS}; give the output folder of a run")
    for run_id in dict.fromkeys(one.run_id for one in (*events, *lines)):
        addresses.find_run(run_id, client)
        for event in (one for one in sync.unsent(events, run_id) if is_inside(home, one)):
            try:
                store.send(client, home, event)
            except Exception as error:  # of the server or its stores; the others may arrive
                errors.append(error)
                continue
            sync.append(home / sync.EVENTS, sync.sent(event))
            sent[event.kind] += 1
        own, there = [x for x in lines if x.run_id == run_id], store.logged_metrics(client, run_id)
        sent["metric"] += store.log_metrics(client, client.get_run(run_id), own, there)
    if errors:
        raise errors[0]
    return sent


def is_inside(home: Path, event: sync.Event) -> bool:
    """Whether the files of an event exist and are, links followed, inside of an output folder."""
    table = f"{sync.TABLES}/{event.name}" if event.kind == "table" else ""
    path = home / (event.path or table)
    found = [one.resolve() for one in (path, *path.rglob("*"))]
    return path.exists() and all(one.is_relative_to(home.resolve()) for one in found)


def main(arguments: argparse.Namespace) -> None:
    home = Path(arguments.replay)
    remedy = "fix that and run this again: nothing is sent twice"
    with addresses.store_errors(f"MLflow does not accept all of {home}", lambda _: remedy):
        sent = replay(addresses.open_client(), home)
    print(f"sent: {sync.in_words(sent) or 'nothing, MLflow has it all'}")


def make_parser() -> argparse.ArgumentParser:
    parser = cli.make_parser(__doc__, prog="python -m utils.tracking")
    text = "output folder whose runs MLflow is to have in full; what it has is not sent again"
    parser.add_argument("--replay", required=True, metavar="OUTPUT_DIR", help=text)
    return parser


if __name__ == "__main__":
    cli.run(main, make_parser())
