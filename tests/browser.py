"""A headless Chromium for tests, driven over its own pipe (Chrome DevTools Protocol): no driver to install."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
ANSWER_SECONDS = 60.0
LOOK_SECONDS = 0.02
KEYS = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "Space": (32, " ")}


def browser() -> str:
    """A headless Chromium; without one the tests fail in CI, and say elsewhere why they are skipped."""
    found = os.environ.get("LAB_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        reason = f"no Chromium here: apt-get install chromium-headless-shell, or LAB_BROWSER=... (looked for {NAMES})"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


class Tab:
    """One page in the browser. What its console says, and what it fetches from elsewhere, is kept."""

    def __init__(self, driver: Driver, session: str) -> None:
        self._driver, self.session = driver, session
        self.console: list[str] = []
        self.requests: list[str] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to one command of the protocol."""
        return self._driver.ask(method, parameters, self.session)

    def open(self, url: str) -> None:
        """Load a page, also the same one again."""
        self.ask("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def reload(self) -> None:
        self.run("window.isOld = true")
        self.ask("Page.reload")
        self.until("!window.isOld && document.readyState === 'complete'")

    def run(self, script: str) -> Any:
        """The value of an expression in the page, which may be a promise."""
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, condition: str, seconds: float = ANSWER_SECONDS) -> Any:
        """The value of an expression once it holds."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                found = self.run(condition)
            except Gone:  # between two pages
                found = None
            if found is not None and found is not False:  # an element travels as an empty object
                return found
            assert time.monotonic() < deadline, f"not within {seconds} s: {condition}\n{self.console}"
            time.sleep(LOOK_SECONDS)

    def type(self, text: str) -> None:
        """Type into what has the focus."""
        self.ask("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key, as from a keyboard."""
        code, text = KEYS[key]
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.ask("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector: str) -> None:
        """Click with the mouse in the middle of an element."""
        look = (
            f"(() => {{ const one = document.querySelector({json.dumps(selector)}); if (!one) return null;"
            "one.scrollIntoView({block: 'nearest'}); const box = one.getBoundingClientRect();"
            "return box.width ? [box.x + box.width / 2, box.y + box.height / 2] : null; })()"
        )
        box, before = self.until(look), None
        while box != before:  # what is above it may still be growing
            time.sleep(LOOK_SECONDS)
            box, before = self.until(look), box
        for kind in ("mousePressed", "mouseReleased"):
            self.ask("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def screen(self, width: int, height: int = 800, **media: str) -> None:
        """Set the size of the screen, and media features such as `prefers-color-scheme` (with underscores)."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        features = [{"name": name.replace("_", "-"), "value": value} for name, value in media.items()]
        self.ask("Emulation.setEmulatedMedia", features=features)

    def picture(self, path: Path) -> Path:
        """A screenshot, PNG."""
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))
        return path


class Gone(RuntimeError):
    """The page that was asked is no longer there."""


class Driver:
    """A running browser."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back = to, back
        self._number, self._rest = 0, b""
        self._tabs: dict[str, Tab] = {}

    def tab(self) -> Tab:
        """A new page, which shares the storage of the others."""
        target = self.ask("Target.createTarget", {"url": "about:blank"})["targetId"]
        session = self.ask("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        self._tabs[session] = tab = Tab(self, session)
        return tab

    def ask(self, method: str, parameters: Mapping[str, Any], session: str = "") -> dict[str, Any]:
        self._number += 1
        asked = {"id": self._number, "method": method, "params": parameters}
        os.write(self._to, json.dumps(asked | ({"sessionId": session} if session else {})).encode() + b"\0")
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            message = self._next(deadline, method)
            if message.get("id") == self._number:
                if "error" in message:
                    raise Gone(f"{method}: {message['error']['message']}")
                result: dict[str, Any] = message["result"]
                return result
            self._note(message)

    def _next(self, deadline: float, method: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select([self._back], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"the browser does not answer {method}"
            piece = os.read(self._back, 2**16)
            assert piece, "the browser has ended"
            self._rest += piece
        whole, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(whole)
        return message

    def _note(self, message: Mapping[str, Any]) -> None:
        tab, kind, about = (
            self._tabs.get(message.get("sessionId", "")),
            message.get("method"),
            message.get("params", {}),
        )
        if tab is None:
            return
        if kind == "Runtime.consoleAPICalled":
            tab.console.append(" ".join(str(one.get("value", one.get("description"))) for one in about["args"]))
        elif kind == "Runtime.exceptionThrown":
            details = about["exceptionDetails"]
            tab.console.append(details.get("exception", {}).get("description", details["text"]))
        elif kind == "Log.entryAdded":
            tab.console.append(f"{about['entry']['text']} {about['entry'].get('url', '')}")
        elif kind == "Network.requestWillBeSent":
            tab.requests.append(about["request"]["url"])


@contextmanager
def driven(folder: Path, options: Sequence[str] = ()) -> Iterator[Driver]:
    """A browser with a profile of its own in `folder`, until the end of the block."""
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    command = [
        *("bash", "-c", f'exec "$@" 3<&{command_read} 4>&{answer_write}', "bash"),  # the pipe's numbers are fixed
        *(browser(), "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"),
        *("--hide-scrollbars", f"--user-data-dir={folder / 'profile'}", *options, "about:blank"),
    ]  # fmt: skip
    with (folder / "browser.log").open("w") as errors:
        process = subprocess.Popen(
            command, pass_fds=(command_read, answer_write), stdout=errors, stderr=errors, start_new_session=True
        )
    os.close(command_read)
    os.close(answer_write)
    try:
        yield Driver(command_write, answer_read)
    finally:
        os.close(command_write)
        os.close(answer_read)
        try:
            process.wait(5)  # it ends with its pipe
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)
