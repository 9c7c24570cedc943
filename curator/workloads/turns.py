"""What of a text record a language model is trained on: pieces of text, each supervised or not.

Shapes: ``{"text"}``, ``{"prompt", "completion"}``, ``{"messages"}`` (OpenAI, TRL), ``{"instruction", "input",
"output"}`` (alpaca), ``{"conversations"}`` (sharegpt); and for preferences ``{"chosen", "rejected"}``, with a
``prompt`` or without, each a string or a list of messages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from curator.workloads.base import Record

Segment = tuple[str, bool]
"""A piece of text, and whether its tokens are supervised."""

Messages = Sequence[Mapping[str, str]]

ROLES = {"human": "user", "gpt": "assistant"}
"""sharegpt's names for who speaks."""

UNSAID = "\N{OBJECT REPLACEMENT CHARACTER}"
"""What no turn begins with."""


def conversation(record: Record) -> Messages | None:
    """The messages of a chat record (OpenAI, or sharegpt), None of any other."""
    if "messages" in record:
        return _messages(record["messages"])
    if "conversations" in record:
        turns = record["conversations"]
        return [{"role": ROLES.get(t["from"], t["from"]), "content": str(t["value"])} for t in turns]
    return None


def plain_segments(record: Record) -> list[Segment] | None:
    """The segments of a record without turns, None of one with."""
    if "prompt" in record and "completion" in record:
        return [(str(record["prompt"]), False), (str(record["completion"]), True)]
    if "instruction" in record and "output" in record:
        asked = "\n\n".join(str(record[key]) for key in ("instruction", "input") if record.get(key))
        return [(asked + "\n\n", False), (str(record["output"]), True)]
    return [(str(record["text"]), True)] if "text" in record else None


def chat_segments(messages: Messages, tokenizer: Any) -> list[Segment]:
    """Assistant turns supervised, everything around them not, in the checkpoint's own chat template.

    A template is a program: the only safe way to know what a turn adds is to render the conversation with and without
    it. Where a template rewrites earlier turns, the rendered prefixes differ and only the last turn is supervised.
    Before a first turn there is nothing to render (transformers refuses an empty conversation): what comes before the
    assistant speaks is then what the turn has in common with the same turn saying something else.
    """
    if not getattr(tokenizer, "chat_template", None):
        return [(f"{m['role']}: {m['content']}\n", m["role"] == "assistant") for m in messages]

    def rendered(turns: Messages, ask: bool = False) -> str:
        return str(tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask))

    def before(i: int) -> str:
        if i:
            return rendered(messages[:i], True)
        said, other = rendered(messages[:1]), rendered([{**messages[0], "content": UNSAID}])
        return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(said, other, strict=False)))

    spoken = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    cuts = [(before(i), rendered(messages[: i + 1])) for i in spoken]
    whole = rendered(messages)
    stable = [(asked, after) for asked, after in cuts if after.startswith(asked) and whole.startswith(after)]
    segments: list[Segment] = []
    done = 0
    for asked, after in stable:
        segments += [(whole[done : len(asked)], False), (whole[len(asked) : len(after)], True)]
        done = len(after)
    return [*segments, (whole[done:], False)]


def preference(record: Record) -> tuple[Record, Record] | None:
    """The preferred and the rejected answer as records of their own, None where there is no such pair."""
    if "chosen" not in record or "rejected" not in record:
        return None
    return _answer(record.get("prompt"), record["chosen"]), _answer(record.get("prompt"), record["rejected"])


def _answer(prompt: Any, answer: Any) -> Record:
    if isinstance(answer, str):
        return {"prompt": "" if prompt is None else str(prompt), "completion": answer}
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or ())
    return {"messages": _messages([*asked, *answer])}


def _messages(turns: Sequence[Mapping[str, Any]]) -> Messages:
    return [{"role": str(turn["role"]), "content": str(turn["content"])} for turn in turns]


def last_only(segments: Sequence[Segment]) -> list[Segment]:
    """Only the last supervised piece stays so: two answers to one conversation differ in their last turn."""
    last = max((i for i, (_, counts) in enumerate(segments) if counts), default=-1)
    return [(text, i == last) for i, (text, _) in enumerate(segments)]
