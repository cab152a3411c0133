"""SIGTERM, SIGINT and SIGUSR1 in the middle of trainings, alone and under torchrun."""

import json
import os
import random
import signal
import time
from pathlib import Path

from tests.chaos.harness import Result
from tests.chaos.trainings import (
    FLAGS,
    STEPS,
    Process,
    command,
    differences,
    prepare,
    start,
    status_in_mlflow,
)
from utils.training.checkpoint import checkpoints_in, step_of

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGUSR1: 143}
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SECONDS = 20  # to stop in
UNDER_TORCHRUN = 5  # every so many one


def run(count: int) -> Result:
    """Stop `count` trainings once each, go on, and compare with one that nobody stopped."""
    prepare()
    chance = random.Random(1)
    slowest, problems, together, stopped = 0.0, [], 0, 0
    references: dict[tuple[str, bool], float] = {}
    for number in range(count):
        script, number_of = list(FLAGS)[number % 2], list(CODES)[number // 2 % 3]
        torchrun = number % UNDER_TORCHRUN == 0
        together += torchrun
        reference = f"{script}-reference-{torchrun}"
        if (script, torchrun) not in references:
            begin = _start(script, reference, torchrun)
            references[script, torchrun] = _seconds_of_training(begin, Path(reference))
        output_dir = Path(f"{script}-{number}")
        process = _start(script, str(output_dir), torchrun)
        _wait_for_training(process, output_dir)
        process.wait(chance.uniform(0, 0.8 * references[script, torchrun]))
        begin = time.monotonic()
        if process.running():
            # torchrun does not hand SIGUSR1 on; batch systems send it to the scripts
            sent = signal.SIGTERM if torchrun and number_of == signal.SIGUSR1 else number_of
            os.kill(process.pid, sent)
            stopped += 1
            if not process.wait(SECONDS):
                process.kill()
                problems.append(f"{output_dir}: still there after {SECONDS} s")
            slowest = max(slowest, time.monotonic() - begin)
            problems += _check_stop(process.code, None if torchrun else CODES[sent], output_dir)
        again = _start(script, str(output_dir), torchrun)
        again.wait(600)
        if again.code != 0:
            problems.append(f"{output_dir}: exit code {again.code}: {again.output[-500:]}")
        else:
            problems += differences(output_dir, Path(reference))
    faulty = len({problem.split(":")[0] for problem in problems})
    detail = (
        f"{stopped} stopped in the middle ({together} under torchrun), the slowest within "
        f"{slowest:.1f} s; {count - faulty} kept every step and ended bit-equal when resumed"
    )
    return Result(count, not problems, "; ".join([detail, *problems[:3]]))


def _start(script: str, output_dir: str, torchrun: bool) -> Process:
    words = command(script, output_dir)
    return start(TORCHRUN + words, forked=False) if torchrun else start(words, forked=True)


def _wait_for_training(process: Process, output_dir: Path) -> None:
    """Wait for its first checkpoint, from which on signals are obeyed."""
    end = time.monotonic() + 300
    while not checkpoints_in(output_dir) and process.running() and time.monotonic() < end:
        time.sleep(0.005)


def _seconds_of_training(process: Process, output_dir: Path) -> float:
    _wait_for_training(process, output_dir)
    begin = time.monotonic()
    if not process.wait(600) or process.code != 0:
        raise RuntimeError(f"{output_dir} fails when nobody stops it:\n{process.output}")
    return time.monotonic() - begin


def _check_stop(code: int | None, expected: int | None, output_dir: Path) -> list[str]:
    """What is wrong with a training that was stopped."""
    status = json.loads((output_dir / "status.json").read_text())
    if status["status"] == "FINISHED" and status["step"] == STEPS:
        return []  # the signal came after its last step
    kept = step_of(checkpoints_in(output_dir)[-1])
    faults = []
    if expected is not None and code != expected:
        faults.append(f"exit code {code}, not {expected}")
    if status["status"] != "KILLED":
        faults.append(f"status.json says {status['status']}")
    if (marked := status_in_mlflow(output_dir)) != "KILLED":
        faults.append(f"MLflow says {marked}")
    if status["step"] != kept:
        faults.append(f"stopped at step {status['step']}, but step {kept} is kept")
    return [f"{output_dir}: {fault}" for fault in faults]
