"""Takes docs/images/serve.png, the picture of the chat page: `python -m docs.draw_serve`, on an idle machine.

The page in a headless Chromium, before a server over SmolLM2 in two shards. Every figure in it is of that run.
"""

import tempfile
from pathlib import Path

from tests.browser import Tab, driven
from tests.serve.servers import shards
from tests.speculative.processes import role

SIZE = (1360, 860)
WORDS = ("tracking=none", "device.threads=1")
CUTS = ("0:15", "15:30")
CHATS = (
    "Why is the sky blue?",
    "Add a docstring to this function and show the whole function again:\n\n"
    "def mean(numbers):\n    total = sum(numbers)\n    count = len(numbers)\n    return total / count",
)
SETTINGS = '{"temperature": "0", "max_tokens": "160"}'
IDLE = "document.querySelector('.assistant') && !document.querySelector('[aria-busy=true]')"
SEEN = "/waiting\\s*0, 0/.test(document.querySelector('#status').innerText)"
"""The figures beside the chat are those after the answer."""
SECONDS = 300.0


def draw(path: Path) -> None:
    """Ask each question in a chat of its own, and take the picture after the last answer."""
    with tempfile.TemporaryDirectory() as name, shards([*WORDS, "network.port=0"], CUTS) as addresses:
        folder = Path(name)
        words = ["project.engine=split", f"project.split.shards=[{','.join(addresses)}]", "project.context=1024"]
        words += [*WORDS, "network.port=0", f"project.journal={folder / 'journal'}"]
        with role("serve", *words) as server, driven(folder) as browser:
            tab = browser.tab()
            tab.screen(*SIZE)
            tab.open(f"http://127.0.0.1:{server.port}/")
            tab.run(f"localStorage.setItem('lab.settings', {SETTINGS!r})")
            tab.reload()
            for question in CHATS:
                tab.click("#new-chat")
                _ask(tab, question)
            tab.run("document.activeElement.blur()")
            tab.picture(path)


def _ask(tab: Tab, question: str) -> None:
    tab.click("#message")
    tab.type(question)
    tab.press("Enter")
    tab.until(f"{IDLE} && {SEEN}", SECONDS)


if __name__ == "__main__":
    draw(Path(__file__).parent / "images" / "serve.png")
