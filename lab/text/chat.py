"""A dialogue as a model's chat template shows it, with the beginning and the end of each answer.

An answer is the text that the template adds to a generation prompt, up to the mark that ends it. So no template is
known by name: each is probed once for what it writes after an answer (`_ending`).
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from lab.learning.records import Dialogue, MalformedRecord, Message

if TYPE_CHECKING:  # transformers takes seconds to import, and only names are needed here
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

PROBE_PROMPT, PROBE_ANSWER, PROBE_REPLY = "probe8341prompt", "probe8341answer", "probe8341reply"


@dataclass(frozen=True)
class Piece:
    """A stretch of a dialogue's text."""

    text: str
    answer: bool


@dataclass(frozen=True)
class _Ending:
    """The text that a template writes after an answer."""

    always: str
    """After every answer: the mark that ends it, and whitespace."""
    finally_: str
    """After that, at the end of the dialogue only (Phi-3 writes its end-of-text token there)."""


class Chat:
    """A tokenizer's chat template; without one, a prompt, a line break, an answer, the end-of-text token."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self.has_template = bool(tokenizer.chat_template)
        self._end = self._ending() if self.has_template else _Ending(str(tokenizer.eos_token or ""), "")
        if not (self._end.always + self._end.finally_).strip():
            log.warning("the model's chat template writes no end behind an answer: the model will not learn to stop")

    def sequences(self, dialogue: Dialogue) -> list[list[Piece]]:
        """Texts to train on, with every answer once, as the model would give it; none without answers.

        One text holds them all, unless the template shows an answer differently once the dialogue continues (Qwen3
        leaves out earlier reasoning): then the dialogue up to that answer is a separate text. MalformedRecord if the
        template refuses the dialogue, leaves out a part, or does not show an answer as a continuation of its prompt.
        """
        # An opening message of the assistant answers nothing.
        places = [i for i, m in enumerate(dialogue.messages) if i and m.role == "assistant" and m.counts]
        if not places:
            return []
        if not self.has_template:
            return [self._plain(dialogue, places)]
        found: list[list[Piece]] = []
        shown = rest = ""
        for place in places:
            before, answer, after = self._answer(dialogue, place)
            if found and before.startswith(shown):
                found[-1] += [Piece(before[len(shown) :], False), Piece(answer, True)]
            else:
                if found:
                    found[-1].append(Piece(rest, False))
                found.append([Piece(before, False), Piece(answer, True)])
            shown, rest = before + answer, after
        found[-1].append(Piece(rest, False))
        return found

    def _answer(self, dialogue: Dialogue, place: int) -> tuple[str, str, str]:
        """The text before an answer, the answer with its end, and what the template writes after that."""
        before = self._show(dialogue, place, generate=True)
        through = self._show(dialogue, place + 1)
        if not through.startswith(before):
            rule = "be shown by the model's chat template as a continuation of the text that the model would answer"
            raise MalformedRecord(f"{dialogue.name} messages[{place}] must {rule}")
        rest = through[len(before) :]
        self._check_shown(dialogue, place, before, rest)
        answer = rest.removesuffix(self._end.finally_) if self._end.always.strip() else rest
        if (self._end.always + self._end.finally_).strip():
            answer = answer.rstrip()
        else:
            answer = answer.removesuffix(self._end.always)
        answer = self._up_to_end(answer, dialogue.messages[place])
        return before, answer, rest[len(answer) :]

    def _up_to_end(self, answer: str, message: Message) -> str:
        """`answer` up to and including the template's last end-of-text token: no model has to generate what follows.

        The message itself may contain the same text, where it ends nothing.
        """
        end = str(self._tokenizer.eos_token or "")
        said = message.content + json.dumps(dict(message.extra), ensure_ascii=False)
        if not end or answer.count(end) <= said.count(end):
            return answer
        return answer[: answer.rindex(end) + len(end)]

    def _check_shown(self, dialogue: Dialogue, place: int, before: str, rest: str) -> None:
        """MalformedRecord for a part that the template leaves out: it drops what it does not know without an error."""
        for index, message in enumerate(dialogue.messages[:place]):
            # Llama 3.1 shows a tool's result as a JSON string.
            shown = message.content.strip() in before or (message.role == "tool" and _escaped(message) in before)
            if message.role != "assistant" and not shown:
                raise _hidden(dialogue, f"messages[{index}].content")
        message = dialogue.messages[place]
        # Reasoning may be shown with other whitespace around it.
        if any(part.strip() not in rest for part in message.content.replace("<think>", "</think>").split("</think>")):
            raise _hidden(dialogue, f"messages[{place}].content")
        if message.extra.get("reasoning_content", "").strip() not in rest:
            raise _hidden(dialogue, f"messages[{place}].reasoning_content")
        check_shown(dialogue, place, lambda marked: self._show(marked, place + 1))

    def _plain(self, dialogue: Dialogue, places: list[int]) -> list[Piece]:
        if dialogue.tools or any(message.extra.get("tool_calls") for message in dialogue.messages):
            raise MalformedRecord(f"{dialogue.name} must hold no tools for a model without a chat template")
        messages = enumerate(dialogue.messages[: places[-1] + 1])
        return [Piece(m.content + (self._end.always if i in places else "\n"), i in places) for i, m in messages]

    def _show(self, dialogue: Dialogue, count: int, generate: bool = False) -> str:
        """The first `count` messages as the template shows them."""
        try:
            return self._render([plain_message(m) for m in dialogue.messages[:count]], generate, list(dialogue.tools))
        except RecursionError:
            raise MalformedRecord(f"{dialogue.name} must not nest tools or tool calls too deeply") from None
        except Exception as error:  # a template raises what it likes
            reason = " ".join(str(error).split())[:200]
            raise MalformedRecord(
                f"{dialogue.name} must suit the model's chat template, got: {reason or type(error).__name__}"
            ) from None

    def _render(self, messages: list[dict[str, Any]], generate: bool, tools: list[Any]) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                messages, tools=tools or None, tokenize=False, add_generation_prompt=generate
            )
        )

    def _ending(self) -> _Ending:
        """Probe the template with a made-up dialogue: what follows an answer that is the last, or is not."""
        asked = [{"role": "user", "content": PROBE_PROMPT}, {"role": "assistant", "content": PROBE_ANSWER}]
        try:
            last = self._render(asked, False, [])
            goes_on = self._render([*asked, {"role": "user", "content": PROBE_REPLY}], False, [])
        except Exception:  # a template for other dialogues than this one
            last = goes_on = ""
        if PROBE_ANSWER not in last or PROBE_ANSWER not in goes_on:
            return _Ending(str(self._tokenizer.eos_token or ""), "")
        behind, later = (text.rpartition(PROBE_ANSWER)[2] for text in (last, goes_on))
        cut = self._whole_mark(behind, _shared(behind, later))
        return _Ending(behind[:cut], behind[cut:])

    def _whole_mark(self, text: str, cut: int) -> int:
        """`cut`, or the start of the mark that it would cut in two: a special token, else text without a space."""
        marks = [token for token in {*self._tokenizer.get_added_vocab(), *self._tokenizer.all_special_tokens} if token]
        for mark in marks:
            start = text.find(mark, max(0, cut - len(mark) + 1))
            if 0 <= start < cut < start + len(mark):
                return start
        if cut == len(text) or any(text.startswith(mark, cut) for mark in marks):
            return cut
        word = text[:cut].split()[-1:] if cut and not text[cut - 1].isspace() and not text[cut].isspace() else []
        return cut - sum(map(len, word))


def check_shown(dialogue: Dialogue, place: int, show: Callable[[Dialogue], str]) -> None:
    """MalformedRecord for a part of the dialogue up to `place` that the template leaves out.

    The template's own text may contain a short part by chance, so a mark is appended to each part and must show.
    """
    marks: dict[str, str] = {}
    shown = show(_marked(dialogue, place, marks))
    for mark, what in marks.items():
        if mark not in shown:
            raise _hidden(dialogue, what)


def _hidden(dialogue: Dialogue, what: str) -> MalformedRecord:
    return MalformedRecord(f"{dialogue.name} {what} must be shown by the model's chat template as it is")


def plain_message(message: Message) -> dict[str, Any]:
    """The message as a dict for a chat template."""
    return {"role": message.role, "content": message.content, **message.extra}


def _shared(one: str, other: str) -> int:
    """Length of the common prefix."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))


def _escaped(message: Message) -> str:
    """The content as in a JSON string, without the quotes."""
    return json.dumps(message.content.strip(), ensure_ascii=False)[1:-1]


def _marked(dialogue: Dialogue, place: int, marks: dict[str, str]) -> Dialogue:
    """The dialogue up to `place` with a mark after each part that must be shown; `marks` gets the part of each mark.

    The content of earlier answers gets no mark: a template may leave out their reasoning.
    """
    messages = []
    for index, message in enumerate(dialogue.messages[: place + 1]):
        name, content, extra = f"messages[{index}]", message.content, dict(message.extra)
        if content.strip() and (message.role != "assistant" or index == place):
            content += _new_mark(marks, f"{name}.content")
        if message.calls:
            extra["tool_calls"] = [_marked_call(call, marks, f"{name}.tool_calls") for call in extra["tool_calls"]]
        messages.append(replace(message, content=content, extra=extra))
    return replace(
        dialogue, messages=tuple(messages), tools=tuple(_marked_tool(tool, marks) for tool in dialogue.tools)
    )


def _marked_call(call: dict[str, Any], marks: dict[str, str], part: str) -> dict[str, Any]:
    function = dict(call["function"])
    name = function["name"]
    function["name"] += _new_mark(marks, part)
    if function["arguments"]:
        mark = _new_mark(marks, part)
        function["arguments"] = {**function["arguments"], mark: mark}
    marked = {**call, "function": function}
    if "id" in call:  # Kimi K2 shows a call's name only as a word of its id
        marked["id"] = re.sub(rf"\b{re.escape(name)}\b", lambda _: function["name"], call["id"])
    return marked


def _marked_tool(tool: dict[str, Any], marks: dict[str, str]) -> dict[str, Any]:
    function = tool.get("function", tool)
    if not function.get("name"):
        return tool
    marked = {**function, "name": function["name"] + _new_mark(marks, "tools")}
    return {**tool, "function": marked} if "function" in tool else marked


def _new_mark(marks: dict[str, str], part: str) -> str:
    mark = f"mark8341n{len(marks)}end"
    marks[mark] = part
    return mark
