"""Headless Chromium for tests of pages, driven by the DevTools protocol through a pipe; no package is needed.

https://chromedevtools.github.io/devtools-protocol/: with --remote-debugging-pipe, JSON that ends in a zero byte goes
to file descriptor 3 and comes from 4.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
WITH_WEBGL = ("--use-angle=swiftshader", "--enable-unsafe-swiftshader")  # without a GPU
DESKTOP, PHONE = (1280, 800), (390, 780)
PATIENCE = 60.0  # seconds, for machines that do other work

# Click an element that a user could click: it is scrolled into view where it is not, and lies on top there.
# (Clicks by Input.dispatchMouseEvent get lost on busy machines while a page moves.)
CLICK = """selector => {
  const element = document.querySelector(selector);
  const seen = () => {
    const r = element.getBoundingClientRect();
    return element.contains(document.elementFromPoint(r.x + r.width / 2, r.y + r.height / 2));
  };
  if (!seen()) element.scrollIntoView({block: "center"});
  if (!seen()) throw new Error(`${selector} is covered`);
  element.click();
}"""


class Browser:
    """One page of a headless Chromium; `errors` are what its console and its scripts complained about."""

    def __init__(self, program: str, flags: tuple[str, ...]) -> None:
        self._profile = tempfile.mkdtemp(prefix="browser")
        (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
        theirs_in, theirs_out = _move_up(theirs_in), _move_up(theirs_out)
        # descriptors of the pipe have fixed numbers: a shell puts ours there
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out} {theirs_in}<&- {theirs_out}>&-'
        arguments = [program, *FLAGS, *flags, f"--user-data-dir={self._profile}", "about:blank"]
        self._process = subprocess.Popen(
            ["bash", "-c", command, *arguments],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in, self._rest, self._number = ours_out, ours_in, b"", 0
        self._session: str | None = None
        self.errors: list[str] = []
        self.requests: list[str] = []
        pages = self._wait_for_page()
        self._session = self.call("Target.attachToTarget", targetId=pages, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)
        still = {"name": "prefers-reduced-motion", "value": "reduce"}  # what turns by itself is drawn all the time
        self.call("Emulation.setEmulatedMedia", features=[still])

    def _wait_for_page(self) -> str:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            targets = self.call("Target.getTargets")["targetInfos"]
            for target in targets:
                if target["type"] == "page":
                    return str(target["targetId"])
            time.sleep(0.02)
        raise AssertionError("Chromium opened no page")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol; returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None and not method.startswith(("Target.", "Browser.")):
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], PATIENCE)
            part = os.read(self._in, 1 << 20) if ready else b""
            assert part, "Chromium ended or says nothing"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        said = message.get("params", {})
        if message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(said["exceptionDetails"].get("exception", said["exceptionDetails"])))
        elif message.get("method") == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.errors.append(said["entry"]["text"])
        elif message.get("method") == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        return message

    def open(self, path: Path, size: tuple[int, int] = DESKTOP, fragment: str = "") -> None:
        """Open a page from disk and wait until it is loaded."""
        self.resize(size)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=f"{path.resolve().as_uri()}{fragment}")
        self.until("document.readyState === 'complete' && location.protocol === 'file:'")

    def resize(self, size: tuple[int, int]) -> None:
        """Give the page another width and height."""
        phone = size[0] < 600
        self.call(
            "Emulation.setDeviceMetricsOverride", width=size[0], height=size[1], deviceScaleFactor=1, mobile=phone
        )

    def run(self, code: str) -> Any:
        """The value of an expression of JavaScript; a promise is awaited."""
        result = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, code: str) -> None:
        """Wait until an expression holds."""
        end = time.monotonic() + PATIENCE
        while not self.run(code):
            assert time.monotonic() < end, (code, self.errors)
            time.sleep(0.01)

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        """Send a mouse event: "mouseMoved", "mousePressed", "mouseReleased"."""
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def click(self, selector: str) -> None:
        """Click an element, which must be visible."""
        self.run(f"({CLICK})({json.dumps(selector)})")

    def type(self, selector: str, text: str) -> None:
        """Put text into a field."""
        self.run(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def clipboard(self) -> str:
        """What was copied last."""
        self.call("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
        return str(self.run("navigator.clipboard.readText()"))

    def picture(self, path: Path) -> None:
        """Write a PNG of what is seen."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self) -> None:
        """End the browser and remove its profile."""
        os.write(self._out, b'{"id": 0, "method": "Browser.close"}\0')
        os.close(self._out)
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        shutil.rmtree(self._profile, ignore_errors=True)


def _move_up(descriptor: int) -> int:
    """Give a descriptor a number beyond those that the pipe needs."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD, 10)
    os.close(descriptor)
    return moved


def start_browser(*, webgl: bool = False) -> Browser:
    """Start Chromium; skips the test where there is none."""
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None or shutil.which("bash") is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is on PATH")
    return Browser(program, WITH_WEBGL if webgl else ("--disable-gpu",))
