"""
Conversations written out by a tokenizer's chat template, and where in the text the assistant speaks.

A template that marks its generation (`{% generation %}`) says it itself. Any other is asked for the conversation
up to each of the assistant's turns, with and without the turn: the difference is the turn. Where the shorter text
is not how the longer one begins (templates that drop the reasoning of earlier turns), there is no telling, and the
row is refused.
"""

from __future__ import annotations

import re
from typing import Any

from memplan.errors import DataError
from memplan.train.documents import Spans

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def render_chat(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any, mask: str
) -> tuple[str, Spans | None]:
    """
    The text of a conversation, and the characters that the loss is taken on.

    Args:
        tokenizer: of transformers, with a chat template.
        messages: `{role, content, ...}` each.
        tools: JSON schemas of functions, or None.
        mask: `none` (the loss is taken on everything: None), `prompt` (on the assistant's turns), `history` (on the
            last of them).

    Raises:
        DataError: the template refuses the conversation, or does not tell where the assistant speaks.
    """
    if mask == "none":
        return _render(tokenizer, messages, tools), None
    if _GENERATION.search(tokenizer.chat_template):
        text, spans = _marked(tokenizer, messages, tools)
    else:
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        text = _render(tokenizer, messages, tools)
        wanted = turns[-1:] if mask == "history" else turns
        spans = [_turn(tokenizer, messages, tools, index, text) for index in wanted]
    return text, tuple(spans[-1:] if mask == "history" else spans)


def _turn(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any, index: int, text: str
) -> tuple[int, int]:
    before = _render(tokenizer, messages[:index], tools, add_generation_prompt=True)
    after = text
    if index + 1 < len(messages):
        after = _render(tokenizer, messages[: index + 1], tools)
    if not (text.startswith(after) and after.startswith(before)):
        raise DataError(
            f"the chat template writes turn {index + 1} differently when others follow it, so that its place in the "
            "conversation cannot be told",
            hint="use `--set data.mask=history` (the last answer only), `data.mask=none`, or a `data.chat_template` "
            "with {% generation %} marks",
        )
    return len(before), len(after)


def _marked(tokenizer: Any, messages: list[dict[str, Any]], tools: Any) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    with_template = {"chat_template": tokenizer.chat_template, **tokenizer.special_tokens_map}
    try:
        texts, spans = render_jinja_template(
            [messages], tools, return_assistant_tokens_mask=True, **with_template
        )
    except Exception as error:
        raise _refused(error) from error
    return texts[0], [(start, end) for start, end in spans[0]]


def _render(
    tokenizer: Any, messages: list[dict[str, Any]], tools: Any, *, add_generation_prompt: bool = False
) -> str:
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except Exception as error:
        raise _refused(error) from error
    return text


def _refused(error: Exception) -> DataError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return DataError(f"the chat template refuses the conversation: {reason}")
