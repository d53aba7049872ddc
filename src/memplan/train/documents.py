"""
From rows and texts to documents: what is tokenised, and on which characters of it the loss is taken.

    text        a column of text (`data.text`)
    prompt      a prompt and its completion (`data.prompt`, `data.completion`)
    chat        a list of messages (`data.messages`), written out by the tokenizer's own chat template

With `data.format: auto` the columns of a row tell its kind: messages before prompt and completion before text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from memplan.errors import DataError
from memplan.job.spec import Data
from memplan.train.sources import Row, Text

Spans = tuple[tuple[int, int], ...]
"""Character ranges [start, end) of a text."""

Render = Callable[[list[dict[str, Any]], Any, str], tuple[str, Spans | None]]
"""(messages, tools, mask) to the text of a conversation and the spans that the loss is taken on."""

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""ShareGPT's names of roles, whose messages are `{from, value}`."""


@dataclass(frozen=True)
class Document:
    """
    One text. A `row` is a sample by itself and is truncated; other documents are cut into several samples.
    """

    text: str
    is_row: bool
    trained: Spans | None = None
    """Characters that the loss is taken on; None: all."""
    is_rendered: bool = False
    """The text holds its own special tokens, as a chat template writes them: none are added."""
    is_first: bool = True
    is_last: bool = True
    """False for a block of a long text that goes on in the next document, `is_first` for that one."""


class Reader:
    """
    Makes documents of rows as the job's `data` says, and counts them by kind.

    Args:
        render: writes a conversation out; None where the tokenizer has no chat template.
    """

    def __init__(self, data: Data, render: Render | None) -> None:
        self.data = data
        self.render = render
        self.kinds: dict[str, int] = {}

    def documents(self, source: Iterator[Row | Text]) -> Iterator[Document]:
        """
        The documents of a source in its order; empty ones are left out.

        Raises:
            DataError: a row that is not as `data` says.
        """
        for item in source:
            if isinstance(item, Text):
                kind = "file"
                document = Document(item.text, is_row=False, is_first=item.is_first, is_last=item.is_last)
            else:
                kind = self._kind(item)
                document = self._from_row(item, kind)
            if document.text.strip() or not document.is_last:
                self.kinds[kind] = self.kinds.get(kind, 0) + document.is_first
                yield document

    def _from_row(self, row: Row, kind: str) -> Document:
        if kind == "chat":
            return self._from_chat(row)
        return self._from_prompt(row) if kind == "prompt" else self._from_text(row)

    def _kind(self, row: Row) -> str:
        data = self.data
        if data.format != "auto":
            return data.format
        if data.messages in row.fields or "conversations" in row.fields:
            return "chat"
        return "prompt" if {data.prompt, data.completion} <= set(row.fields) else "text"

    def _from_text(self, row: Row) -> Document:
        return Document(_text(row, self.data.text, "data.text"), is_row=True)

    def _from_prompt(self, row: Row) -> Document:
        prompt = _column(row, self.data.prompt, "data.prompt")
        completion = _column(row, self.data.completion, "data.completion")
        if isinstance(prompt, list) and isinstance(completion, list):
            return self._rendered(row, [*prompt, *completion])
        prompt = _text(row, self.data.prompt, "data.prompt")
        completion = _text(row, self.data.completion, "data.completion")
        text = prompt + completion
        if not completion.strip():
            return Document("", is_row=True)
        spans = None if self.data.mask == "none" else ((len(prompt), len(text)),)
        return Document(text, is_row=True, trained=spans)

    def _from_chat(self, row: Row) -> Document:
        column = self.data.messages
        if column not in row.fields and "conversations" in row.fields:
            column = "conversations"
        return self._rendered(row, _column(row, column, "data.messages"))

    def _rendered(self, row: Row, messages: Any) -> Document:
        if self.render is None:
            raise DataError(
                f"{row.where} is a conversation, and the model's tokenizer has no chat template",
                hint="name a file with one, `--set data.chat_template=template.jinja`, or use an instruct model",
            )
        try:
            text, spans = self.render(_messages(messages), row.fields.get("tools"), self.data.mask)
        except DataError as error:
            raise DataError(f"{row.where}: {error.message}", hint=error.hint) from error
        return Document(text, is_row=True, trained=spans, is_rendered=True)


def _messages(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise DataError("the messages are not a list of objects with `role` and `content`")
    return [_message(message) for message in value]


def _message(message: dict[str, Any]) -> dict[str, Any]:
    if "role" in message:
        # Columnar files fill up what some messages do not have.
        return {name: value for name, value in message.items() if value is not None or name == "content"}
    role = _ROLES.get(str(message.get("from")))
    if role is None or "value" not in message:
        raise DataError(
            f"a message has {', '.join(f'`{name}`' for name in message)}, not `role` and `content`"
        )
    return {"role": role, "content": message["value"]}


def _column(row: Row, column: str, field: str) -> Any:
    if column not in row.fields:
        columns = ", ".join(f"`{name}`" for name in row.fields) or "none"
        raise DataError(
            f"{row.where} has no column `{column}`; it has {columns}",
            hint=f"name the column: `--set {field}=NAME`",
        )
    return row.fields[column]


def _text(row: Row, column: str, field: str) -> str:
    value = _column(row, column, field)
    if not isinstance(value, str):
        raise DataError(f"{row.where}: column `{column}` holds a {type(value).__name__}, not text")
    return value
