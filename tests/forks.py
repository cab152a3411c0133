"""Processes for tests, without the seven seconds that each one takes to import PyTorch and MLflow.

They are forked from a process that has imported both and has done nothing else.
"""

import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

from utils.demo import PRELOADED

OURS = ("tests", "utils", "vqvae", "transformer")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([*PRELOADED, "torch.distributed.run"])


def become(
    words: list[str],
    folder: str,
    env: dict[str, str],
    stdin: Connection,
    stdout: Connection,
    log: str,
) -> None:
    """Do in this process what `python WORDS` would do in a new one."""
    with open(log, "wb") as stderr:
        for number, file in enumerate((stdin, stdout, stderr)):
            os.dup2(file.fileno(), number)
    stdin.close()
    stdout.close()
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False))
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in [x for x in sys.modules if x.partition(".")[0] in OURS]:
        del sys.modules[name]  # this file's imports, of a folder that may not be that of the words
    sys.argv, kind = words, words[0]
    if kind == "-c":
        sys.path.insert(0, "")
        exec(words.pop(1), {"__name__": "__main__"})
    elif kind == "-m":
        sys.path.insert(0, folder)
        runpy.run_module(words.pop(1), run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(kind).parent))
        runpy.run_path(kind, run_name="__main__")


class Forked:
    """`python WORDS` in the current folder; used like a `subprocess.Popen` with pipes and text."""

    def __init__(self, *words: object, env: dict[str, str] | None = None) -> None:
        log = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        (stdin, writer), (reader, stdout) = (CONTEXT.Pipe(duplex=False) for _ in range(2))
        values = dict(os.environ if env is None else env)
        arguments = ([str(word) for word in words], os.getcwd(), values, stdin, stdout, log.name)
        self._process = CONTEXT.Process(target=become, args=arguments)
        self._process.start()
        self.stdin, self.stdout = (
            os.fdopen(os.dup(pipe.fileno()), mode) for pipe, mode in ((writer, "w"), (reader, "r"))
        )
        self.stderr = log
        for pipe in (stdin, writer, reader, stdout):
            pipe.close()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.is_alive():
            os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def wait(self) -> None:
        self._process.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Unlike a Popen, it does not wait for a process that nothing has ended."""
        self.kill()
        self.wait()
        for file in (self.stdin, self.stdout, self.stderr):
            file.close()

    def communicate(self, timeout: float = 200) -> tuple[str, str]:
        """What it wrote to stdout since, and to stderr, when it has ended."""
        timer = threading.Timer(timeout, self.kill)
        timer.start()
        self.stdin.close()
        with self.stdout, self.stderr:
            out = self.stdout.read()
            self._process.join()
            timer.cancel()
            return out, self.stderr.read()


def run_forked(
    *words: object, env: dict[str, str] | None = None, check: bool = False
) -> subprocess.CompletedProcess:
    """Like `subprocess.run` of `python WORDS`, with what it wrote."""
    process = Forked(*words, env=env)
    out, error = process.communicate()
    assert process.returncode == 0 or not check, error
    return subprocess.CompletedProcess(words, process.returncode, out, error)
