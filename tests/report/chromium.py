"""Headless Chromium driven over its own pipe: no driver, no package, no port. One page, by the DevTools protocol."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr --v=0"
).split()
_BECOME = "import os, sys; a = sys.argv; os.dup2(int(a[1]), 3); os.dup2(int(a[2]), 4); os.execv(a[3], a[3:])"
_PATIENCE = 60.0  # seconds for one answer


class Page:
    """A page that is open. Commands go to file descriptor 3 of the browser, answers come from 4, ended by a zero."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._out, self._in, self._buffer = to_browser, from_browser, b""
        self._numbers = itertools.count(1)
        self._session: str | None = None

    def __call__(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + _PATIENCE
        while True:
            answer = self._next(end)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]

    def open(self, url: str) -> None:
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self._session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self("Page.enable")
        self("Page.navigate", url=url)
        end = time.monotonic() + _PATIENCE
        while self.run("document.readyState + location.href") != f"complete{url}":
            assert time.monotonic() < end, f"{url} does not load"
            time.sleep(0.05)

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def size(self, width: int, height: int = 1000) -> None:
        self("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def media(self, kind: str, scheme: str = "light") -> None:
        self("Emulation.setEmulatedMedia", media=kind, features=[{"name": "prefers-color-scheme", "value": scheme}])

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            assert select.select([self._in], [], [], max(0.0, end - time.monotonic()))[0], "Chromium does not answer"
            read = os.read(self._in, 1 << 20)
            assert read, "Chromium has ended"
            self._buffer += read
        message, self._buffer = self._buffer.split(b"\0", 1)
        return json.loads(message)


@contextmanager
def opened(path: Path, folder: Path) -> Iterator[Page]:
    """The page at `path`, in a browser of its own whose profile is in `folder`."""
    assert BROWSER is not None
    pipes = [*os.pipe(), *os.pipe()]
    ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipes]  # away from 3 and 4
    for end in pipes:
        os.close(end)
    read_3, write_3, read_4, write_4 = ends

    command = [BROWSER, *FLAGS, "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}", "about:blank"]
    become = [sys.executable, "-c", _BECOME, str(read_3), str(write_4), *command]
    quiet = subprocess.DEVNULL
    browser = subprocess.Popen(become, pass_fds=(read_3, write_4), stdout=quiet, stderr=quiet)
    os.close(read_3)
    os.close(write_4)
    try:
        page = Page(write_3, read_4)
        page.open(path.as_uri())
        yield page
    finally:
        browser.kill()
        browser.wait()
        os.close(write_3)
        os.close(read_4)
