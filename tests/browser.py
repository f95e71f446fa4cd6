"""Chromium without a window, driven over a pipe by the DevTools protocol."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",  # as root there is none; what is opened are this project's own pages
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
SECONDS = 60


def find() -> str | None:
    """The browser's command, if there is one."""
    return next((found for found in map(shutil.which, NAMES) if found), None)


class Page:
    """An open page, with all its requests and errors."""

    def __init__(self, commands: int, answers: int):
        self._commands, self._answers = commands, answers
        self._buffer, self._number, self._session = b"", 0, ""
        self.requests: list[str] = []
        """URLs, in order."""
        self.errors: list[str] = []
        """Exceptions, console messages of level error, and what the browser logs: blocked and
        failed loads, violated policies."""
        self._loaded = False
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self._call(f"{domain}.enable")

    def open(
        self, path: Path, *, width: int = 1200, dark: bool = False, print_media: bool = False
    ) -> None:
        """Show a file in a window of this width, and wait until all of it is there."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=False,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call(
            "Emulation.setEmulatedMedia",
            media="print" if print_media else "screen",
            features=[scheme],
        )
        self.requests, self.errors, self._loaded = [], [], False
        self._call("Page.navigate", url=path.absolute().as_uri())
        ends = time.monotonic() + SECONDS
        while not self._loaded:
            self._receive(ends)
        self.ask(
            "Promise.all(Array.from(document.images, i => i.decode().catch(() => null))).then(() "
            "=> true)"
        )

    def ask(self, expression: str) -> Any:
        """Evaluate an expression in JavaScript, although the page itself may run none."""
        answer = self._call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def picture(self, path: Path) -> None:
        """Write all of the page, from its top to its bottom, as a PNG."""
        shot = self._call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def _call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        ends = time.monotonic() + SECONDS
        while True:
            answer = self._receive(ends)
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]

    def _receive(self, ends: float) -> dict[str, Any]:
        """The next message, an answer or an event."""
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0.0, ends - time.monotonic()))
            assert ready, f"the browser has not answered within {SECONDS} s"
            piece = os.read(self._answers, 1 << 20)
            assert piece, "the browser has stopped"
            self._buffer += piece
        message, self._buffer = self._buffer.split(b"\0", 1)
        answer = json.loads(message)
        kind, about = answer.get("method"), answer.get("params", {})
        if kind == "Page.loadEventFired":
            self._loaded = True
        elif kind == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif kind == "Runtime.exceptionThrown":
            self.errors.append(about["exceptionDetails"]["text"])
        elif kind == "Runtime.consoleAPICalled" and about["type"] in ("error", "assert"):
            self.errors.append(str([argument.get("value") for argument in about["args"]]))
        elif kind == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.errors.append(about["entry"]["text"])
        return answer


@contextmanager
def browse(profile: Path) -> Iterator[Page]:
    """Start a browser with an empty profile, and stop it.

    Raises:
        RuntimeError: There is none.
    """
    command = find()
    if command is None:
        raise RuntimeError(
            f"no browser is installed (looked for {', '.join(NAMES)}), and these tests open "
            "reports in one: apt-get install chromium, or "
            'leave them out with pytest -m "not slow and not gpu and not browser"'
        )
    (theirs_read, commands), (answers, theirs_write) = os.pipe(), os.pipe()
    # Chromium reads commands from descriptor 3 and answers on 4: first out of the way, so that
    # neither overwrites the other.
    high_read, high_write = (
        fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs_read, theirs_write)
    )
    process = subprocess.Popen(
        [
            "bash",
            "-c",
            f'exec "$@" 3<&{high_read} 4>&{high_write}',
            "browser",
            command,
            *FLAGS,
            f"--user-data-dir={profile}",
        ],
        pass_fds=(high_read, high_write),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for end in (theirs_read, theirs_write, high_read, high_write):
        os.close(end)
    try:
        yield Page(commands, answers)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(commands)
        os.close(answers)
