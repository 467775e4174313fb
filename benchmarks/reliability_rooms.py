"""More rooms of `benchmarks.reliability`: hostile servers, files around a network, secrets; and what is promised.

Each function yields (room, fault, outcome, seconds, failure); the failure is empty where all was as promised.
"""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

from geo_pretrain.backbones.build import network_states
from geo_pretrain.catalog import Arch
from geo_pretrain.convert import convert
from geo_pretrain.errors import HubError, WeightsMismatch
from geo_pretrain.hub import transfer
from geo_pretrain.redact import safe, without_paths
from tests.authors_files import layout
from tests.hub.raw_servers import BODY, CASES, RawServer
from tests.mutations import Reader, faults, readers

Row = tuple[str, str, str, float, str]
SECRET = "hunter2"
PLACES = (  # where a login or key stands
    "http://me:{}@host/hub",
    "https://{}@host/x",
    "http://me:{}/x@host",
    "https://host/x?token={}",
    "https://host/x?a=1&X-Amz-Signature={}&b=2",
    "atk?sig={}",
    "https://host/x?{}",
    "Authorization: Bearer {}",
)
AROUND = ("{}", "cannot open {}", "'{}'", "({})", "{}: HTTP 403", "<{}>", "{}, {}", "- {}: no\n- {}: no", "see {}.")
HOMES = ("/home/{}/scans", "/Users/{}/scans", "~{}/scans", "/home/{}", "C:\\Users\\{}\\scans", "file:///home/{}/scans")
VALUES = ("{}", "clouds:{}", "a={}, b=1", "['{}']", "from {} to", "path={}")
CONTROL = [*range(32), *range(0x7F, 0xA0), 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xD800]

PROMISES = Path(__file__).with_name("promises.md").read_text(encoding="utf-8")  # for the page


def _tried(room: str, fault: str, outcome: str, check: Callable[[], str]) -> Row:
    begin = time.perf_counter()
    try:
        failure = check()
    except Exception as error:  # whatever it is, it is the result
        failure = f"{type(error).__name__}: {error}"
    return room, fault, outcome, round(time.perf_counter() - begin, 2), failure


def hostile_servers(cured: str, explained: str) -> Iterator[Row]:
    """Servers that never end, lie, or redirect where nobody wanted to go."""
    for name, case in CASES.items():

        def check(case: object = case) -> str:
            says, answer, slow = case.says, case.answer, case.slow  # type: ignore[attr-defined]
            patience = {transfer.TIMEOUT_VARIABLE: "0.1" if slow else "60"}
            with (
                mock.patch.dict(os.environ, patience),
                mock.patch.object(transfer, "ATTEMPTS", 1),
                tempfile.TemporaryDirectory() as folder,
                RawServer(answer) as server,
            ):
                part = Path(folder) / "part"
                try:
                    transfer.download(f"{server.url}/x", part, limit=20 * len(BODY))
                except HubError as error:
                    if part.exists():
                        return "a part was left"
                    return "" if says and says in str(error) else f"said {error}"
                return "" if not says and part.read_bytes() == BODY else "was taken for a file"

        yield _tried("hostile servers", name, explained if case.says else cured, check)


def damaged_files(explained: str, count: int = 300) -> Iterator[Row]:
    """Damaged files of every reader of data: each is read, or refused as our error that names it."""
    with tempfile.TemporaryDirectory() as folder:
        for name, reader in readers(Path(folder)).items():

            def check(reader: Reader = reader) -> str:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    found = [f"{type(error).__name__}: {error}" for _, error in faults(reader, Path(folder), count)]
                return "; ".join(found[:1])

            yield _tried("damaged files of data", f"{name}, {count} damaged files", explained, check)


def secrets(explained: str) -> Iterator[Row]:
    """Logins, keys, folders and control characters in texts that are shown or published."""
    for place in PLACES:
        for around in AROUND:
            text = around.replace("{}", place.format(SECRET))
            yield _tried("secrets and folders", f"shown: {text!r}", explained, partial(_shows, safe(text)))
    for home in HOMES:
        for value in VALUES:
            text = value.format(home.format(SECRET))
            yield _tried("secrets and folders", f"published: {text!r}", explained, partial(_shows, without_paths(text)))
    for code in CONTROL:
        if chr(code) not in "\t\n":
            text = f"a{chr(code)}b"
            yield _tried(
                "secrets and folders",
                f"control character U+{code:04X}",
                explained,
                partial(_shows, safe(text), text),
            )


def _shows(text: str, secret: str = SECRET) -> str:
    return f"shows {text!r}" if secret in text else ""


def wrapped_files(cured: str, explained: str) -> Iterator[Row]:
    """Networks among other tensors: found whole and named, or refused; never a part."""
    arch = Arch("resnet", {"depth": 18, "width": 8})
    networks = network_states(arch)
    state = dict(layout("torchvision", arch=arch, fc=True).content)
    head, bias = state["fc.weight"], state["fc.bias"]
    besides: tuple[dict[str, Any], ...] = ({}, {"head.weight": head}, {"a.b.weight": bias, "x": bias})
    for prefix in ("", "module.", "model.", "model.backbone.", "net.encoder.trunk."):
        for beside in besides:
            for lost in ("", "layer3.1.conv2.weight"):
                file = {prefix + key: value for key, value in state.items() if key != lost} | beside

                def check(file: dict[str, Any] = file, lost: str = lost) -> str:
                    try:
                        converted = convert("torchvision", file, networks, prefix=None)
                    except WeightsMismatch:
                        return "" if lost else "was refused"
                    if lost:
                        return "a part was taken for the whole"
                    same = all(value.equal(state[key]) for key, value in converted.weights["encoder"].items())
                    return "" if same else "other weights were taken"

                plain = not prefix and beside  # nothing tells a head from a network's own layer there
                if plain and not lost:
                    continue
                fault = f"prefix {prefix!r}, {len(beside)} keys beside" + (f", without {lost}" if lost else "")
                yield _tried("files around a network", fault, explained if lost else cured, check)
