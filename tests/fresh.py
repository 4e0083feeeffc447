"""Python processes that have imported torch and nothing of ours, each at the price of a fork.

Run as a program it reads a line of JSON for each: the folder to import from, the environment, code,
and how long it may run; it answers with exit status and output.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


class FreshPythons:
    """Within, ``run`` gives what came of code in a new process.

    Args:
        preload: modules that all of them have imported.
    """

    def __init__(self, *preload: str) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self._server = subprocess.Popen(
            [sys.executable, "-B", __file__, "numpy", "torch", *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd="/",
        )

    def __enter__(self) -> FreshPythons:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()

    def run(
        self, folder: Path, code: str, limit: float = 60, **environment: str
    ) -> tuple[int, str]:
        """Exit status (of a process that a signal ended, minus its number) and output.

        Raises:
            TimeoutError: it ran longer than ``limit`` seconds.
        """
        request = {"folder": str(folder), "code": code, "limit": limit, "environment": environment}
        print(json.dumps(request), file=self._server.stdin, flush=True)
        status, output = json.loads(self._server.stdout.readline())
        if status is None:
            raise TimeoutError(output)
        return status, output


def _serve() -> None:
    sys.path.remove(str(Path(__file__).parent))
    for name in sys.argv[1:]:
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                _become(request, output.fileno())
            status = _wait(child, request["limit"])
            output.seek(0)
            print(json.dumps((status, output.read().decode(errors="replace"))), flush=True)


def _wait(child: int, limit: float) -> int | None:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def _become(request: dict, output: int) -> None:
    os.setpgid(0, 0)  # so that what it starts ends with it
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    sys.path.insert(0, request["folder"])
    status = 0
    try:
        exec(request["code"], {"__name__": "__main__"})
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _serve()
