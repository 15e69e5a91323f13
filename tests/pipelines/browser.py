"""A headless Chromium driven over its DevTools pipe: no packages, no port (https://chromedevtools.github.io/devtools-protocol/)."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_PATIENCE = 60.0  # seconds for one answer
_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # root in a container has none
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-component-update",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)
# Chromium reads from descriptor 3 and writes to 4.
_STARTER = """
import os, sys
for number, place in zip(sys.argv[1:3], (60, 61)):
    os.dup2(int(number), place)
os.dup2(60, 3)
os.dup2(61, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """Path of an installed Chromium."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab.

    Attributes:
        faults: texts of errors and warnings since it was opened, requests that left the file included.
    """

    def __init__(self, to: int, source: int) -> None:
        self._to, self._source, self._rest, self._number = to, source, b"", 0
        self._session: str | None = None
        self.faults: list[str] = []
        self._events: list[str] = []
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self(f"{domain}.enable")

    def __call__(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send one command and return its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, file: Path, *, width: int, height: int = 900, scheme: str = "light", media: str = "screen") -> None:
        """Load a file in a window of this size, and wait until it has loaded."""
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self("Emulation.setEmulatedMedia", media=media, features=[{"name": "prefers-color-scheme", "value": scheme}])
        self._events.clear()
        self("Page.navigate", url=file.resolve().as_uri())
        while "Page.loadEventFired" not in self._events:
            self._receive()

    def value(self, expression: str) -> Any:
        """Evaluate a JavaScript expression (or promise) and return its value as JSON."""
        reply = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(json.dumps(reply["exceptionDetails"]))
        return reply["result"].get("value")

    def screenshot(self, file: Path, *, whole: bool = True) -> None:
        """Write a PNG of the page."""
        content = self("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(content))

    def _receive(self) -> dict[str, Any]:
        """Return the next message; events are stored."""
        while b"\0" not in self._rest:
            if not select.select([self._source], [], [], _PATIENCE)[0]:
                raise TimeoutError("Chromium does not answer")
            chunk = os.read(self._source, 1 << 16)
            if not chunk:
                raise RuntimeError("Chromium has ended")
            self._rest += chunk
        first, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(first)
        if method := message.get("method"):
            self._events.append(method)
            self._judge(method, message["params"])
        return message

    def _judge(self, method: str, details: dict[str, Any]) -> None:
        if method == "Log.entryAdded":
            self.faults.append(details["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.faults.append(json.dumps(details["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled" and details["type"] in ("error", "warning", "assert"):
            self.faults.append(json.dumps(details["args"]))
        elif method == "Network.requestWillBeSent" and not details["request"]["url"].startswith(("file:", "data:")):
            self.faults.append(f"requested {details['request']['url'][:200]}")


@contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """Open a tab of a Chromium with its profile in `folder`; closed on exit."""
    program = find_chromium()
    assert program
    read_there, to = os.pipe()
    source, write_there = os.pipe()

    starter = [sys.executable, "-c", _STARTER, str(read_there), str(write_there)]
    process = subprocess.Popen(
        [*starter, program, *_FLAGS, f"--user-data-dir={folder / 'profile'}"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        pass_fds=(read_there, write_there),
        start_new_session=True,
        env={**os.environ, "HOME": str(folder), "XDG_CONFIG_HOME": str(folder), "XDG_CACHE_HOME": str(folder)},
    )
    os.close(read_there)
    os.close(write_there)
    try:
        yield Page(to, source)
    finally:
        process.terminate()
        process.wait()
        os.close(to)
        os.close(source)
