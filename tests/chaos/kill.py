"""kill -9 at random moments of both trainings, until they have ended all the same."""

import random
import time
from pathlib import Path

from tests.chaos.harness import Result
from tests.chaos.trainings import FLAGS, Process, command, differences, prepare, start
from utils.files import is_intact
from utils.training.checkpoint import checkpoints_in

FROM_COMMAND_LINE = 10  # every so many kills one of a process that was started there


def run(count: int) -> Result:
    """Kill `count` times, going on after each kill; then compare with an uninterrupted training."""
    prepare()
    lives = {
        (script, forked): _reference(script, forked) for forked in (False, True) for script in FLAGS
    }
    chance = random.Random(0)
    kills, trainings, unreadable, problems = {True: 0, False: 0}, 0, 0, []
    while sum(kills.values()) < count:
        script = list(FLAGS)[trainings % 2]
        trainings += 1
        output_dir = Path(f"{script}-{trainings}")
        while True:
            done = sum(kills.values())
            forked = done % FROM_COMMAND_LINE != FROM_COMMAND_LINE - 1
            process = start(command(script, str(output_dir)), forked=forked)
            moment = chance.uniform(0, lives[script, forked]) if done < count else 600
            if process.wait(moment):
                break
            process.kill()
            kills[forked] += 1
            unreadable += sum(not is_intact(folder) for folder in checkpoints_in(output_dir))
        problems += _faults(process, output_dir, Path(f"{script}-reference"))
    faulty = len({problem.split(":")[0] for problem in problems})
    detail = (
        f"{trainings} trainings ended, {trainings - faulty} bit-equal and with every metric "
        f"once, here and in MLflow; {unreadable} unreadable checkpoints; {kills[False]} kills hit "
        "processes from the command line, the others forks of a warm one"
    )
    held = not problems and not unreadable
    return Result(sum(kills.values()), held, "; ".join([detail, *problems[:3]]))


def _reference(script: str, forked: bool) -> float:
    """An uninterrupted training; its seconds."""
    output_dir = f"{script}-reference" if forked else f"{script}-reference-cold"
    begin = time.monotonic()
    process = start(command(script, output_dir), forked=forked)
    if not process.wait(600) or process.code != 0:
        raise RuntimeError(f"{script} fails when nobody kills it:\n{process.output}")
    return time.monotonic() - begin


def _faults(process: Process, output_dir: Path, reference: Path) -> list[str]:
    if process.code != 0:
        return [f"{output_dir}: exit code {process.code}: {process.output[-500:]}"]
    return differences(output_dir, reference)
