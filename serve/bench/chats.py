"""Part of the benchmark with a chat of two turns."""

from __future__ import annotations

from lab.bench import Row, Sample, judged, ratio
from serve.bench.client import Answer, Message
from serve.bench.rig import Rig

ANSWER_TOKENS = 8
QUESTION = "Say that again in one short sentence."
MOST_OVER_COLD = 0.15


def second_turn(rig: Rig) -> Row:
    """Time to the first token of a chat's second turn, relative to that of a server without a prefix cache.

    Chats begin differently, so that none finds another one's prompt.
    """
    project, words = rig.project, rig.words(rig.settings)
    warm: list[Answer] = []
    cold: list[Answer] = []
    with rig.server(words) as keeping, rig.server([*words, "project.prefix_tokens=0"]) as forgetting:
        for number in range(project.history_repeats):
            history: list[Message] = [
                {"role": "system", "content": f"Chat {number}. You answer questions about a text."},
                {"role": "user", "content": rig.prose(project.history_tokens, number)},
            ]
            first = keeping.chat(history, ANSWER_TOKENS)
            history += [{"role": "assistant", "content": first.text}, {"role": "user", "content": QUESTION}]
            warm.append(keeping.chat(history, ANSWER_TOKENS))
            cold.append(forgetting.chat(history, ANSWER_TOKENS))
    over = ratio([one.first_seconds for one in warm], [one.first_seconds for one in cold])
    row = {
        "history_tokens": project.history_tokens,
        "cached_tokens": min(one.cached_tokens for one in warm),
        "cold_cached_tokens": max(one.cached_tokens for one in cold),
        "first_token_seconds": Sample.of([one.first_seconds for one in warm]),
        "cold_first_token_seconds": Sample.of([one.first_seconds for one in cold]),
        "over_cold": over,
        "same_text": [one.text for one in warm] == [one.text for one in cold],
    }
    holds = over.median <= MOST_OVER_COLD and bool(row["same_text"])
    return judged("second_turn", row, f"over_cold at most {MOST_OVER_COLD}, same_text", holds)
