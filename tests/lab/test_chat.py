"""Labels under chat templates of every habit: each answer counts, with the mark that ends it, and no more."""

from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from lab.chat import Chat
from lab.examples import examples
from lab.models import byte_tokenizer
from lab.records import Dialogue, MalformedRecord, Message, parse_row

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


def test_tools_need_a_template() -> None:
    with pytest.raises(MalformedRecord, match="f:1 must hold no tools for a model without a chat template"):
        examples([parse_row(CALL, "f:1")], byte_tokenizer(), 64)


def test_a_template_without_any_end_is_said(caplog: pytest.LogCaptureFixture) -> None:
    endless = END_ONCE.replace("{% else %}{{ eos_token }}", "")
    assert counted(endless, dialogue(*TURNS)) == [["A1", "A2"]]
    assert "writes no end behind an answer" in caplog.text
