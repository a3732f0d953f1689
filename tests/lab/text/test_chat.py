"""Labels under chat templates of every habit: each answer counts, with the mark that ends it, and no more."""

import re
import sys
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lab.learning.records import Dialogue, MalformedRecord, Message, parse_line, parse_row
from lab.models.conversion import byte_tokenizer
from lab.text.chat import Chat
from tests.shared import examples

TURNS = (("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"))

PHI3 = (
    "{% for m in messages %}{{'<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
GPT_OSS = (  # another mark where the dialogue ends
    "{% for m in messages %}<|start|>{{ m['role'] }}<|message|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
QWEN3 = (  # earlier reasoning is left out
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1].strip() }}"
    "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
END_ONCE = (  # nothing but the end of the dialogue has a mark
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}"
)


def tokenizer_with(template: str, *special: str) -> PreTrainedTokenizerBase:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def dialogue(*turns: tuple[str, str], **more: Any) -> Dialogue:
    record = parse_row({"messages": [{"role": role, "content": content} for role, content in turns], **more}, "f:1")
    assert isinstance(record, Dialogue)
    return record


def counted(template: str, record: Dialogue, *special: str) -> list[list[str]]:
    """The counted stretches of each example."""
    tokenizer = tokenizer_with(template, *special)
    found = []
    for example in examples([record], tokenizer, 10_000):
        stretches, before = [], False
        for token, counts in zip(example.ids_T.tolist(), example.counted_T.tolist()):
            if counts:
                stretches += [] if before else [[]]
                stretches[-1].append(token)
            before = counts
        found.append([tokenizer.decode(stretch) for stretch in stretches])
    return found


@pytest.mark.parametrize(
    ("template", "special", "expected"),
    [
        (PHI3, (), [["A1<|end|>", "A2<|end|>"]]),
        (PHI3, ("<|end|>", "<|user|>", "<|assistant|>"), [["A1<|end|>", "A2<|end|>"]]),
        (CHATML, (), [["A1<|im_end|>", "A2<|im_end|>"]]),
        (CHATML, ("<|im_start|>", "<|im_end|>"), [["A1<|im_end|>", "A2<|im_end|>"]]),
        (LLAMA2, (), [[" A1 <eos>", " A2 <eos>"]]),
        (GPT_OSS, (), [["<|message|>A1<|return|>"], ["<|message|>A2<|return|>"]]),
        (GPT_OSS, ("<|return|>", "<|end|>"), [["<|message|>A1<|return|>"], ["<|message|>A2<|return|>"]]),
        (QWEN3, (), [["A1<|im_end|>", "A2<|im_end|>"]]),
        (END_ONCE, (), [["A1\n<eos>"], ["A2\n<eos>"]]),
    ],
)
def test_every_answer_counts_with_its_end_and_nothing_behind_it(
    template: str, special: tuple[str, ...], expected: list[list[str]]
) -> None:
    assert counted(template, dialogue(*TURNS), *special) == expected
    [*_, [last]] = counted(template, dialogue(*TURNS[2:]), *special)
    assert last == expected[-1][-1], "one turn alone ends as the last of many"


def test_reasoning_that_is_left_out_later_counts_where_it_was_given() -> None:
    turns = (("user", "Q1"), ("assistant", "<think>R1</think>A1"), ("user", "Q2"), ("assistant", "<think>R2</think>A2"))
    expected = [["<think>R1</think>A1<|im_end|>"], ["<think>R2</think>A2<|im_end|>"]]
    assert counted(QWEN3, dialogue(*turns)) == expected


def test_an_answer_of_weight_0_is_shown_and_not_counted() -> None:
    messages = tuple(Message(role, content, counts=content != "A1") for role, content in TURNS)
    assert counted(CHATML, Dialogue(messages, "f:1")) == [["A2<|im_end|>"]]


TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}{% for m in messages %}[{{ m['role'] }}]"
    "{{ m['content'] }}{% for call in m['tool_calls'] %}<call>{{ call['function'] | tojson }}</call>{% endfor %}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CALL = {
    "messages": [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "It is 2"},
    ],
    "tools": [{"type": "function", "function": {"name": "add"}}],
}


def test_a_tool_call_counts_as_an_answer() -> None:
    record = parse_row(CALL, "f:1")
    assert isinstance(record, Dialogue)
    call = '<call>{"name": "add", "arguments": {"a": 1}}</call><eos>'
    assert counted(TOOLS, record) == [[call, "It is 2<eos>"]]


RAISING = "{{ raise_exception('roles must alternate') }}"
NO_PREFIX = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")  # as DeepSeek-R1's
NO_SYSTEM = CHATML.replace("<|im_start|>{{", "{% if m['role'] == 'system' %}{% continue %}{% endif %}<|im_start|>{{")
SHOUTING = CHATML.replace("m['content']", "m['content'] | upper")
FAILING = CHATML.replace("m['content']", "m['content'] + m['name']")


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (RAISING, dialogue(*TURNS), "f:1 must suit the model's chat template, got: roles must alternate"),
        (FAILING, dialogue(*TURNS), "f:1 must suit the model's chat template, got: "),
        (NO_PREFIX, dialogue(*TURNS), "messages[1] must be shown by the model's chat template as a continuation"),
        (
            NO_SYSTEM,
            dialogue(("system", "s!"), *TURNS),
            "messages[0].content must be shown by the model's chat",
        ),
        (SHOUTING, dialogue(("user", "q"), ("assistant", "a")), "must be shown by the model's chat template as it is"),
        (CHATML, parse_row(CALL, "f:1"), "messages[1].tool_calls must be shown by the model's chat template as it is"),
        (
            CHATML,
            dialogue(*TURNS, tools=CALL["tools"]),
            "f:1 tools must be shown by the model's chat template",
        ),
    ],
)
def test_a_template_that_does_not_show_a_dialogue_as_it_is_is_refused(
    template: str, record: Dialogue, message: str
) -> None:
    with pytest.raises(MalformedRecord) as caught:
        Chat(tokenizer_with(template)).sequences(record)
    assert message in str(caught.value)


NO_RESULTS = TOOLS.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
NO_CALLS = TOOLS.replace("{% for call in m['tool_calls'] %}", "{% for call in [] %}")
NO_ARGUMENTS = TOOLS.replace("{{ call['function'] | tojson }}", "{{ call['function']['name'] }}")
NO_TOOLS = TOOLS.replace("{{ tools | tojson }}", "")
JSON_RESULTS = TOOLS.replace(
    "{{ m['content'] }}", "{{ m['content'] | tojson if m['role'] == 'tool' else m['content'] }}"
)
NAMES_IN_IDS = TOOLS.replace("{{ call['function'] | tojson }}", "{{ call['id'] }}{{ call['function']['arguments'] }}")


def calling(name: str = "s", result: str = "o", identity: str = "functions.s:0") -> Dialogue:
    """A dialogue whose tool has a name, and gives a result, that stand in each template's own words too."""
    function = {"name": name, "arguments": {"o": "e"}}
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": identity, "function": function}]},
        {"role": "tool", "content": result},
        {"role": "assistant", "content": "It is 2"},
    ]
    record = parse_row({"messages": messages, "tools": [{"type": "function", "function": {"name": name}}]}, "f:1")
    assert isinstance(record, Dialogue)
    return record


@pytest.mark.parametrize(
    ("template", "hidden"),
    [
        (NO_RESULTS, "messages[2].content"),
        (NO_CALLS, "messages[1].tool_calls"),
        (NO_ARGUMENTS, "messages[1].tool_calls"),
        (NO_TOOLS, "tools"),
    ],
)
def test_what_a_template_hides_is_noticed_where_its_own_words_have_the_same_letters(template: str, hidden: str) -> None:
    with pytest.raises(MalformedRecord, match=re.escape(f"f:1 {hidden} must be shown by the model's chat template")):
        Chat(tokenizer_with(template)).sequences(calling())


@pytest.mark.parametrize("template", [TOOLS, JSON_RESULTS, NAMES_IN_IDS])
@pytest.mark.parametrize("result", ["o", '{"sum": "2\\n"}\n'])
def test_a_dialogue_whose_tools_are_all_shown_is_learnt_from(template: str, result: str) -> None:
    [[*_, answer, _]] = Chat(tokenizer_with(template)).sequences(calling(result=result))
    assert answer.text == "It is 2<eos>"


def test_the_end_of_text_token_inside_an_answer_does_not_end_it() -> None:
    turns = (("user", "Q"), ("assistant", "one<eos>two"))
    assert counted(CHATML, dialogue(*turns), "<|im_end|>") == [["one<eos>two<|im_end|>"]]
    assert counted(PHI3, dialogue(*turns)) == [["one<eos>two<|end|>"]]
    assert counted(LLAMA2, dialogue(*turns)) == [[" one<eos>two <eos>"]]


def test_nothing_behind_the_templates_own_end_of_text_token_counts() -> None:
    """Control: there the same token does end an answer."""
    ending = CHATML.replace("<|im_end|>\n", "{{ eos_token }}<|pause|>\n")
    assert counted(ending, dialogue(("user", "Q"), ("assistant", "one<eos>two"))) == [["one<eos>two<eos>"]]
    assert counted(ending, dialogue(*TURNS)) == [["A1<eos>", "A2<eos>"]]


@pytest.mark.parametrize("nested", ["arguments", "tools"])
def test_a_dialogue_that_is_nested_too_deeply_for_the_template_is_malformed(nested: str) -> None:
    deep, flat = "[" * 900 + "]" * 900, "[]"
    arguments, parameters = (deep, flat) if nested == "arguments" else (flat, deep)
    line = (
        '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [{"function": '
        f'{{"name": "f", "arguments": {{"x": {arguments}}}}}}}]}}], '
        f'"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {{"x": {parameters}}}}}}}]}}'
    )
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)  # Python's own; torch raises it when it compiles
    try:
        with pytest.raises(MalformedRecord, match=r"^f:1 .*must not .*nest.* too deeply"):
            examples([parse_line(line.encode(), "f:1")], tokenizer_with(TOOLS), 10_000)
    finally:
        sys.setrecursionlimit(limit)


def test_tools_need_a_template() -> None:
    with pytest.raises(MalformedRecord, match="f:1 must hold no tools for a model without a chat template"):
        examples([parse_row(CALL, "f:1")], byte_tokenizer(), 64)


def test_a_template_without_any_end_is_said(caplog: pytest.LogCaptureFixture) -> None:
    endless = END_ONCE.replace("{% else %}{{ eos_token }}", "")
    assert counted(endless, dialogue(*TURNS)) == [["A1", "A2"]]
    assert "writes no end behind an answer" in caplog.text
