"""Processes that begin where this one stands: a fork spares the seconds in which Python imports torch again."""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, NoReturn


class Forked:
    """`work()` in a forked process with a session of its own; what tests use of `subprocess.Popen`.

    Its output and errors go to one file, which `communicate` reads.
    """

    def __init__(self, work: Callable[[], object], environment: Mapping[str, str] | None = None) -> None:
        self.returncode: int | None = None
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as this object
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, environment or {})

    def _run(self, work: Callable[[], object], environment: Mapping[str, str]) -> NoReturn:
        code = 1
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number in (1, 2):
                os.dup2(self._output.fileno(), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1, closefd=False) for number in (1, 2))
            os.environ.update(environment)
            work()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                sys.stdout.flush()
            os._exit(code)

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self.returncode is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if ended else None
        return self.returncode

    def communicate(self, timeout: float = 900) -> tuple[str, None]:
        """Wait for its end; what it wrote."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"not ended after {timeout} s")
            time.sleep(0.005)
        self._output.seek(0)
        return self._output.read().decode(), None

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


def import_anew(*packages: str) -> None:
    """Have these packages imported anew, as in a process that has just begun."""
    for name in [name for name in sys.modules if name.partition(".")[0] in packages]:
        del sys.modules[name]


def command_line(arguments: Sequence[object], processes: int = 1) -> Forked:
    """`geo-pretrain` with these arguments; several processes are told of each other as by torchrun.

    They are then children of the process that is returned.
    """

    def call() -> None:
        from geo_pretrain.cli import main

        sys.argv = ["geo-pretrain", *map(str, arguments)]
        main()

    def call_all() -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        group = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        ranks = [Forked(call, group | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(processes)]
        for rank in ranks:
            print(rank.communicate()[0])
        sys.exit(max(abs(rank.returncode or 0) for rank in ranks))

    return Forked(call if processes == 1 else call_all)


def forked_module(command: Sequence[str], *, stdout: IO[bytes], env: Mapping[str, str], **options: object) -> Forked:
    """`python -m MODULE ARGUMENTS` in a fork of this process; stands for `subprocess.Popen`."""
    _, flag, module, *_ = command
    assert flag == "-m"

    def call() -> None:
        for number in (1, 2):
            os.dup2(stdout.fileno(), number)
        sys.argv = list(command[2:])
        importlib.import_module(module).main()

    return Forked(call, env)


def under_torchrun(arguments: Sequence[object], processes: int) -> Forked:
    """`geo-pretrain` with these arguments in processes that torchrun's own agent starts, by forks, and watches."""

    def call() -> None:
        from geo_pretrain.cli import main

        sys.argv = ["geo-pretrain", *map(str, arguments)]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"exit code {end.code}") from end

    def agent() -> None:
        from torch.distributed.launcher.api import elastic_launch
        from torch.distributed.run import config_from_args, parse_args

        meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]  # as --standalone sets it
        options = parse_args([*meeting, f"--nproc-per-node={processes}", "-m", "geo_pretrain"])
        config, *_ = config_from_args(options)
        config.start_method = "fork"
        elastic_launch(config, call)()

    return Forked(agent)
