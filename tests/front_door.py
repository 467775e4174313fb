"""Runs the command line in this process as a terminal would: arguments in; exit code, output and files out."""

from __future__ import annotations

import io
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

from geo_pretrain.cli import main


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    output: str
    errors: str


def geo_pretrain(*arguments: object, expected: int | None = 0) -> Ended:
    """Run `geo-pretrain ARGUMENTS` and check its exit code; None: any."""
    output, errors = io.StringIO(), io.StringIO()
    argv = ["geo-pretrain", *map(str, arguments)]
    code = 0
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.dict("os.environ", {"COLUMNS": "200"}),
        mock.patch.object(warnings, "formatwarning", warnings.formatwarning),  # main sets its own
        warnings.catch_warnings(),  # and filters, where it is not the first of several processes
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
    ended = Ended(code, output.getvalue(), errors.getvalue())
    assert expected in (code, None), f"{' '.join(argv)}: {ended}"
    return ended
