"""What a row of data says: a prompt, a demonstration, a preference or a labelled text, in any of the usual forms.

| keys | what it is |
|---|---|
| ``prompt``, ``completion`` | a demonstration |
| ``prompt``, ``chosen``, ``rejected`` | a preference; also ``margin``, a number, and ``tie``: true if both are good |
| ``chosen``, ``rejected`` | a preference between whole dialogues |
| ``messages`` | a dialogue: a demonstration when the assistant speaks last, else a prompt |
| ``prompt`` | a prompt |
| ``text``, and ``label`` | a text, and whether it is positive |

``prompt``, ``completion``, ``chosen`` and ``rejected`` are texts or lists of messages; other keys are passed over.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_core.data.dialogues import Chat, Message, messages_of, split_dialogues, text_of
from rlhf_core.data.records import RowError

Need = Literal["prompt", "demonstration", "pair"]
ANSWERING = ("assistant", "tool")
"""Who may speak first in an answer."""
LABELS = {"1": True, "0": False, "true": True, "false": False, "positive": True, "negative": False}
LABELS |= {"pos": True, "neg": False}


@dataclass(frozen=True)
class Example:
    """One row. ``prompt`` is empty for a text; ``completion`` is the chosen one of a preference."""

    prompt: str
    completion: str | None = None
    rejected: str | None = None
    margin: float = 0.0
    """By how much the chosen one is better, in units of reward."""
    tie: bool = False
    """Whether neither is better."""
    label: bool | None = None
    rendered: bool = False
    """Whether a chat template wrote the texts, so that special tokens in them are meant."""

    def digest(self) -> bytes:
        """Return a SHA-256 of the content."""
        parts = (self.prompt, self.completion, self.rejected, self.margin, self.tie, self.label, self.rendered)
        return hashlib.sha256(repr(parts).encode()).digest()

    @property
    def group(self) -> str:
        """What decides the split: rows of one prompt stay together."""
        return self.prompt or self.completion or ""


def held_out(group: str, share: float) -> bool:
    """Return whether a group of rows is held out: a stable function of its content and the share in [0, 1)."""
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8], "big") < share * 2**64


def example_of(row: dict[str, Any], chat: Chat) -> Example:
    """Return what a row says.

    Raises:
        RowError: a key is missing, or a value has the wrong type, is empty, or contradicts another.
        ValueError: the row has messages, and there is no chat template.
    """
    keys = row.keys()
    if keys & {"chosen", "rejected"}:
        _require(row, "chosen", "rejected")
        return _preference(row, chat)
    if "messages" in keys:
        messages = messages_of(row["messages"], "messages")
        if messages[-1]["role"] != "assistant":
            return Example(chat.prompt(messages), rendered=True)
        if len(messages) == 1:
            raise RowError("empty prompt", "messages has nothing before the assistant's answer")
        return Example(*chat.answered(messages[:-1], messages[-1:]), rendered=True)
    if "completion" in keys:
        _require(row, "prompt")
        return _demonstration(row, chat)
    if "prompt" in keys:
        return _prompt(row["prompt"], chat)
    if "text" in keys:
        text = text_of(row["text"], "text")
        return Example("", text, label=_label(row["label"]) if "label" in keys else None)
    raise RowError(
        "missing keys",
        f"the row has {', '.join(sorted(map(str, keys))) or 'no key'}; it needs prompt, prompt and completion, "
        "chosen and rejected, messages, or text",
    )


def _require(row: dict[str, Any], *names: str) -> None:
    for name in names:
        if name not in row:
            raise RowError("missing keys", f"there is no {name} beside {', '.join(sorted(map(str, row)))}")


def _prompt(value: Any, chat: Chat) -> Example:
    if isinstance(value, list):
        return Example(chat.prompt(messages_of(value, "prompt")), rendered=True)
    return Example(text_of(value, "prompt"))


def _demonstration(row: dict[str, Any], chat: Chat) -> Example:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        turns = _turns(prompt, "prompt", "user")
        own = _own(turns, _turns(completion, "completion", "assistant"), "completion")
        return Example(*chat.answered(turns, own), rendered=True)
    return Example(text_of(prompt, "prompt"), text_of(completion, "completion"))


def _preference(row: dict[str, Any], chat: Chat) -> Example:
    prompt, chosen, rejected = row.get("prompt"), row["chosen"], row["rejected"]
    margin, tie = _margin(row.get("margin")), _tie(row.get("tie"))
    if tie and margin:
        raise RowError("contradiction", f"a tie has no margin, and this one has {margin:g}")
    rendered = any(isinstance(value, list) for value in (prompt, chosen, rejected))
    if rendered:
        turns_a, turns_b = _turns(chosen, "chosen", "assistant"), _turns(rejected, "rejected", "assistant")
        before = _common(turns_a, turns_b) if prompt is None else _before(prompt, turns_a, turns_b)
        own_a, own_b = _own(before, turns_a, "chosen"), _own(before, turns_b, "rejected")
        (prompt, chosen), (_, rejected) = chat.answered(before, own_a), chat.answered(before, own_b)
    elif prompt is None:
        prompt, chosen, rejected = split_dialogues(text_of(chosen, "chosen"), text_of(rejected, "rejected"))
    prompt, chosen, rejected = text_of(prompt, "prompt"), text_of(chosen, "chosen"), text_of(rejected, "rejected")
    if chosen == rejected:
        raise RowError("chosen equals rejected", "the pair says nothing; mark a tie of two texts by tie: true")
    return Example(prompt, chosen, rejected, margin, tie, rendered=rendered)


def _turns(value: Any, name: str, role: str) -> list[Message]:
    """Return messages; a plain text is one message of the given role."""
    return [{"role": role, "content": text_of(value, name)}] if isinstance(value, str) else messages_of(value, name)


def _before(prompt: Any, a: list[Message], b: list[Message]) -> list[Message]:
    """Return the messages before the answers: the prompt's, or more where whole dialogues have some before those.

    A prompt given as text is the user's last message, and the dialogues may begin with a system message.
    """
    before = _turns(prompt, "prompt", "user")
    shared = a[: _shared(a, b)]
    return shared if shared[-len(before) :] == before else before


def _own(before: list[Message], turns: list[Message], name: str) -> list[Message]:
    """Return an answer's own messages: what a whole dialogue has behind the prompt, or all of an answer alone."""
    own = turns[len(before) :] if turns[: len(before)] == before else turns
    if not own:
        raise RowError("empty completion", f"{name} has no message of its own after the prompt")
    if own[0]["role"] not in ANSWERING:
        raise RowError(
            "contradiction",
            f"{name} goes on after the prompt with a message of {own[0]['role']}; "
            "give the answer alone, or the whole dialogue with the prompt's messages first",
        )
    return own


def _shared(a: list[Message], b: list[Message]) -> int:
    """Return how many messages both dialogues begin with."""
    return next((at for at, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))


def _common(a: list[Message], b: list[Message]) -> list[Message]:
    """Return the messages that both dialogues begin with, of two that have no key prompt."""
    same = _shared(a, b)
    if same == len(a) == len(b):
        raise RowError("chosen equals rejected", "the pair says nothing; mark a tie of two texts by tie: true")
    if same == 0:
        raise RowError("no common prompt", "chosen and rejected begin with different messages; give a key prompt")
    return a[:same]


def _margin(value: Any) -> float:
    if value is None or value == "":
        return 0.0
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        number = None
    if number is None:
        raise RowError("wrong type", f"margin is {value!r}; it must be a number")
    if not math.isfinite(number):
        raise RowError("NaN or infinity", f"margin is {value!r}")
    if number < 0:
        raise RowError("contradiction", f"margin is {number:g}; a chosen one cannot be worse (exchange the two)")
    return number


def _tie(value: Any) -> bool:
    if value is None or value == "":
        return False
    if (label := LABELS.get(str(value).lower())) is None:
        raise RowError("wrong type", f"tie is {value!r}; it must be true or false")
    return label


def _label(value: Any) -> bool:
    if (label := LABELS.get(str(value).strip().lower())) is None:
        raise RowError("wrong type", f"label is {value!r}; it must be 0 or 1, true or false, or positive or negative")
    return label


def need_of(example: Example, need: Need) -> Example:
    """Return the example when it serves the need.

    Raises:
        RowError: it does not, as a prompt alone cannot show what to answer.
    """
    if need == "pair" and example.rejected is None:
        raise RowError("no preference", "the row has no chosen and rejected, which a reward model learns from")
    if need == "demonstration" and example.completion is None:
        raise RowError("no completion", "the row has a prompt and nothing to learn from")
    return example
