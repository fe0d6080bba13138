"""Dialogues as prompt and answer: the Human/Assistant text of HH-RLHF, and lists of messages under a chat template."""

import re
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf_core.data.records import RowError

ASSISTANT = re.compile(r"\n\r?\nAssistant:")
ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, str]


def split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    r"""Return prompt, chosen and rejected answer of two whole dialogues.

    The prompt is what both begin with, up to the last ``\n\nAssistant:`` in it (Bai et al., "Training a Helpful and
    Harmless Assistant with RLHF", 2022, whose data are written so).

    Raises:
        RowError: no assistant's turn begins in the common beginning.
    """
    same = (place for place, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b)
    common = chosen[: next(same, min(len(chosen), len(rejected)))]
    turns = [turn.end() for turn in ASSISTANT.finditer(common)]
    if not turns:
        raise RowError(
            "no common prompt",
            r"chosen and rejected have no '\n\nAssistant:' in their common beginning; give a key prompt",
        )
    return chosen[: turns[-1]], chosen[turns[-1] :], rejected[turns[-1] :]


def messages_of(value: Any, key: str) -> list[Message]:
    """Return checked messages.

    Raises:
        RowError: it is no list of ``{"role", "content"}`` with known roles and texts.
    """
    if not isinstance(value, list) or not value:
        raise RowError("wrong type", f"{key} is {_shown(value)}; it must be a list of messages")
    return [_message(one, f"{key}[{index}]") for index, one in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict) or not {"role", "content"} <= value.keys():
        raise RowError("wrong type", f"{where} is {_shown(value)}; it must have role and content")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise RowError("unknown role", f"the role of {where} is {_shown(role)}; it must be one of {', '.join(ROLES)}")
    if isinstance(content, list) and all(isinstance(one, dict) and one.get("type") == "text" for one in content):
        content = "".join(str(one.get("text")) for one in content)
    return {
        "role": role,
        "content": text_of(content, f"the content of {where}", empty=role not in ("user", "assistant")),
    }


def text_of(value: Any, name: str, *, empty: bool = False) -> str:
    """Return a checked text.

    Raises:
        RowError: it is no string, holds what Unicode cannot, or is blank and may not be.
    """
    if isinstance(value, float) and value != value:
        raise RowError("NaN or infinity", f"{name} is NaN")
    if not isinstance(value, str):
        raise RowError("wrong type", f"{name} is {_shown(value)}; it must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("not UTF-8", f"{name} has a byte or a lone surrogate at place {error.start + 1}") from None
    if not empty and not value.strip():
        raise RowError(f"empty {name.split()[-1].partition('[')[0]}", f"{name} is {value!r}")
    return value


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


class Chat:
    """Renders messages by a tokenizer's chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None) -> None:
        self._tokenizer = tokenizer

    def prompt(self, messages: list[Message]) -> str:
        """Return the dialogue with the opening of the assistant's answer.

        Raises:
            ValueError: there is no chat template.
            RowError: the template refuses the messages.
        """
        return self._render(messages, add_generation_prompt=True)

    def answered(self, prompt: list[Message], answer: list[Message]) -> tuple[str, str]:
        """Return prompt and completion, the completion with the template's end of turn."""
        begun, whole = self.prompt(prompt), self._render([*prompt, *answer], add_generation_prompt=False)
        if not whole.startswith(begun):
            raise RowError(
                "refused by the chat template", "the dialogue does not begin with its own prompt under the template"
            )
        return begun, whole[len(begun) :]

    def _render(self, messages: list[Message], *, add_generation_prompt: bool) -> str:
        tokenizer = self._tokenizer
        if tokenizer is None or getattr(tokenizer, "chat_template", None) is None:
            name = getattr(tokenizer, "name_or_path", "") or "the one made here"
            raise ValueError(
                f"the data has lists of messages, and the tokenizer ({name}) has no chat template; take a --model.path "
                "whose tokenizer has one, set chat_template in its tokenizer_config.json, or give texts"
            )
        try:
            rendered = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, TypeError, KeyError) as error:
            raise RowError("refused by the chat template", str(error)) from None
        return str(rendered)
