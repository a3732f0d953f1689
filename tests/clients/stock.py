"""Stock clients against a running server: `python stock.py BASE_URL MODEL`, in a virtual environment of their own.

Prints one line of JSON: of each client its version, and what went wrong ("" for nothing). Each client asks without a
stream and with one, and both must give the same text.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUESTION = "Name three colours."
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
MOST = 24
KEY = "none"


def openai_package(base: str, model: str) -> None:
    from openai import OpenAI

    client = OpenAI(base_url=base, api_key=KEY)
    asked: dict[str, Any] = {"model": model, "messages": MESSAGES, "max_tokens": MOST, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    pieces = client.chat.completions.create(stream=True, **asked)
    same(whole, "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices))


def litellm(base: str, model: str) -> None:
    import litellm

    asked: dict[str, Any] = {
        "model": f"openai/{model}",
        "api_base": base,
        "api_key": KEY,
        "messages": MESSAGES,
        "max_tokens": MOST,
        "temperature": 0,
    }
    whole = litellm.completion(**asked).choices[0].message.content
    pieces = litellm.completion(stream=True, **asked)
    same(whole, "".join(piece.choices[0].delta.content or "" for piece in pieces))
    text = litellm.text_completion(
        model=f"text-completion-openai/{model}", api_base=base, api_key=KEY, prompt=QUESTION, max_tokens=MOST
    )
    assert text.choices[0].text


def langchain_openai(base: str, model: str) -> None:
    from langchain_openai import ChatOpenAI, OpenAI

    options: dict[str, Any] = {"base_url": base, "api_key": KEY, "model": model, "temperature": 0, "max_tokens": MOST}
    chat = ChatOpenAI(**options)
    whole = chat.invoke(QUESTION)
    same(whole.content, "".join(str(piece.content) for piece in chat.stream(QUESTION)))
    assert whole.usage_metadata["output_tokens"] > 0
    assert len(chat.batch([QUESTION, "Name a town."])) == 2
    scored = ChatOpenAI(**options, logprobs=True, top_logprobs=2).invoke(QUESTION)
    assert scored.response_metadata["logprobs"]["content"]
    plain = OpenAI(**options)
    same(plain.invoke(QUESTION), "".join(plain.stream(QUESTION)))


def llm(base: str, model: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        known = [{"model_id": "lab", "model_name": model, "api_base": base, "api_key_name": "lab"}]
        Path(folder, "extra-openai-models.yaml").write_text(json.dumps(known), encoding="utf-8")  # JSON is YAML
        own = os.environ | {"LLM_USER_PATH": folder}
        asked = [sys.executable, "-m", "llm", "-m", "lab", "--key", KEY, "-o", "temperature", "0"]
        asked += ["-o", "max_tokens", str(MOST), QUESTION]
        texts = [
            subprocess.run([*asked, *more], env=own, capture_output=True, text=True, check=True, timeout=120).stdout
            for more in ([], ["--no-stream"])
        ]
    same(*texts)


def instructor(base: str, model: str) -> None:
    import instructor
    from openai import OpenAI
    from pydantic import BaseModel

    class Town(BaseModel):
        """A town."""

        name: str
        inhabitants: int

    client = instructor.from_openai(OpenAI(base_url=base, api_key=KEY), mode=instructor.Mode.JSON_SCHEMA)
    asked: Any = [{"role": "user", "content": "Name a town and its number of inhabitants."}]
    town = client.chat.completions.create(model=model, messages=asked, response_model=Town, max_retries=0, seed=1)
    assert town.name is not None
    assert isinstance(town.inhabitants, int)


def same(whole: Any, streamed: Any) -> None:
    assert whole, "there is no text"
    assert whole == streamed, f"{whole!r} and, as a stream, {streamed!r}"


CLIENTS: dict[str, Callable[[str, str], None]] = {
    "openai": openai_package,
    "litellm": litellm,
    "langchain-openai": langchain_openai,
    "llm": llm,
    "instructor": instructor,
}


def main(base: str, model: str) -> None:
    found = []
    for name, use in CLIENTS.items():
        fault = ""
        try:
            use(base, model)
        except Exception as error:  # every client has its own
            traceback.print_exc()
            fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        found.append({"client": name, "version": version(name), "fault": fault})
    print(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
