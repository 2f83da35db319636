"""From a conversation to a prompt: what a server is sent as messages, as token ids.

A tokenizer with a chat template gets the messages through it. One without gets the form that `ask` uses, text
first, then a question, then the answer:

- System messages and the documents in user messages stand as they are, with a blank line between them.
- Of a user message the question is the last part, if it came in several parts, else its last paragraph; what
  comes before it is a document.
- Earlier questions stand with their answers where they were asked; an assistant's message that answers none
  stands as it is.

Lines of a system message that change from call to call would make everything behind them new text. So lines
that are addressed to a provider's billing are left out, and lines that say what day or time it is move to the
end of the last user message (before its question): the model sees them, and what stands before them is read
once.
"""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from ..data.facts import format_question
from ..data.prompts import PromptFormat
from .decode import check_text
from .tools import Tool, ToolCall

ROLES = ("system", "user", "assistant", "tool")
_BILLING = re.compile(r"\s*x-[\w-]*billing[\w-]*\s*[:=]", re.I)
_DATE = re.compile(
    r"\s*(?:[-*#]\s*)?(?:(?:the )?(?:current|today's|today’s) (?:local |utc )?(?:date|time|datetime)"
    r"|today|now)(?: and time)?\s*(?:is\b|[:=]).*\d",
    re.I,
)
_LONGEST_DATE = 160  # characters; a longer line says more than the date


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: system, user or assistant; tool for the result of a call.
        parts: its texts, in order.
        calls: of tools, that the assistant made behind its texts.
        call_id: of the call whose result it is.
    """

    role: str
    parts: tuple[str, ...]
    calls: tuple[ToolCall, ...] = ()
    call_id: str = ""

    @property
    def text(self) -> str:
        return "\n".join(self.parts)


@dataclass(frozen=True)
class ChatPrompt:
    """What the engine is given.

    Attributes:
        ids: token ids.
        marks: places in them, ascending, from which later prompts may continue: ends of documents and turns.
        stop: texts at which an answer ends.
        trims: whether blanks around an answer belong to the form, not to the answer.
    """

    ids: list[int]
    marks: tuple[int, ...]
    stop: tuple[str, ...]
    trims: bool


@dataclass
class _Text:
    """A prompt as text, with the places worth a mark."""

    text: str = ""
    places: list[int] = field(default_factory=list)

    def mark(self) -> None:
        self.places.append(len(self.text))

    def paragraph(self, text: str) -> None:
        self.text += ("\n\n" if self.text and text else "") + text

    def behind(self, start: int) -> "_Text":
        """The same from a place on."""
        return _Text(self.text[start:], [place - start for place in self.places if place > start])


class OtherTokens(Exception):
    """What follows a document changes the tokens at its end: the whole has to be cut anew."""


def encode_chat(
    tokenizer: Any,
    messages: Sequence[Message],
    *,
    continue_final: bool = False,
    stable: bool = True,
    document: str = "",
    document_tokens: Sequence[int] = (),
    tools: Sequence[Tool] = (),
) -> ChatPrompt:
    """Token ids of a conversation whose next turn is the model's.

    Args:
        tokenizer: of transformers.
        messages: at least one of them a user's.
        continue_final: the last message is the beginning of the model's answer.
        stable: leave out and move lines of system messages that change from call to call (see above).
        document: text in front of the conversation, arranged as `ask` arranges it: before everything, or with
            a chat template in the first user message, where the system messages before it follow.
        document_tokens: if given, `document` is the end of a longer text whose last tokens these are: the ids
            that come back begin with them.
        tools: that the model may call. Whether its template shows them, `CallForm.of` says.

    Raises:
        ValueError: an unknown role, no text to answer, an order of messages that the model's form does not
            have, text that is not valid Unicode, a result of no call, tools without a chat template.
        OtherTokens: the conversation changes how the end of the document is cut into `document_tokens`.
    """
    _check(messages, continue_final)
    late = ""
    if stable:
        messages, late = _split_volatile(messages)
    form = PromptFormat(tokenizer)
    if form.uses_chat:
        made = _from_template(form, _in_first_user(messages, document), late, continue_final, tools)
    elif tools or any(m.calls or m.role == "tool" for m in messages):
        raise ValueError("tools need a model with a chat template, and this one has none")
    else:
        made = _plain(messages, late, document)
    begun = len(document_tokens) > 0
    if begun:
        made = made.behind(max(0, made.text.find(document)))
    options: dict[str, Any] = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
    found = tokenizer(made.text, add_special_tokens=not (form.uses_chat or begun), verbose=False, **options)
    ids = found["input_ids"]
    if ids[: len(document_tokens)] != list(document_tokens):
        raise OtherTokens
    marks: set[int] = set()
    if tokenizer.is_fast:
        ends = [place[1] for place in found["offset_mapping"]]
        marks = {bisect_right(ends, place) for place in made.places}
    return ChatPrompt(
        ids,
        tuple(sorted(m for m in marks if 0 < m < len(ids))),
        tuple(form.stop_strings),
        not form.uses_chat,
    )


def _check(messages: Sequence[Message], continue_final: bool) -> None:
    for number, message in enumerate(messages):
        if message.role not in ROLES:
            raise ValueError(
                f"messages[{number}].role must be one of {', '.join(ROLES)}, got {message.role!r}"
            )
        for part in message.parts:
            if part:
                check_text(f"messages[{number}]", part)
    _check_calls(messages)
    if not any(m.role == "user" and m.text.strip() for m in messages):
        raise ValueError("messages hold no text of a user to answer")
    if continue_final and (messages[-1].role != "assistant" or messages[-1].calls):
        raise ValueError("only an answer can be continued: the last message must be the assistant's")


def _check_calls(messages: Sequence[Message]) -> None:
    """Every result must be that of a call before it: templates would show it as that of another one."""
    known: set[str] = set()
    for number, message in enumerate(messages):
        if message.role == "tool" and message.call_id not in known:
            raise ValueError(
                f"messages[{number}] is the result of call {message.call_id[:100]!r}, which no assistant's "
                "message before it made"
            )
        if message.calls and message.role != "assistant":
            raise ValueError(f"messages[{number}] has calls of tools, and its role is {message.role!r}")
        known |= {call.id for call in message.calls}


def _split_volatile(messages: Sequence[Message]) -> tuple[list[Message], str]:
    """The messages without lines that change from call to call, and those of them that go to the end."""
    kept: list[Message] = []
    late: list[str] = []
    for message in messages:
        if message.role == "system":
            parts = tuple(_stable_lines(part, late) for part in message.parts)
            message = Message("system", tuple(part for part in parts if part.strip()))
        kept.append(message)
    return kept, "\n".join(late)


def _stable_lines(text: str, late: list[str]) -> str:
    lines = []
    for line in text.split("\n"):
        if _BILLING.match(line):
            continue
        if len(line) <= _LONGEST_DATE and _DATE.match(line):
            late.append(line.strip())
        else:
            lines.append(line)
    return "\n".join(lines)


def _in_first_user(messages: Sequence[Message], document: str) -> Sequence[Message]:
    """The conversation with a document in front of the first user's text; system messages that come before
    follow the document, so that it need not be read again when they change."""
    if not document:
        return messages
    first = next(n for n, m in enumerate(messages) if m.role == "user")
    before = [m.text for m in messages[:first] if m.role == "system"]
    texts = [document, *before, messages[first].text.strip()]
    user = Message("user", ("\n\n".join(text for text in texts if text),))
    return [*(m for m in messages[:first] if m.role != "system"), user, *messages[first + 1 :]]


def _plain(messages: Sequence[Message], late: str, document: str = "") -> _Text:
    """The form of `ask`, for a model without chat template."""
    made = _Text(document)
    last = max(n for n, m in enumerate(messages) if m.role == "user")
    if any(m.role == "system" for m in messages[last + 1 :]) or len(messages) > last + 2:
        raise ValueError(
            "messages must end with the user's question, or with the beginning of its answer: this model has "
            "no chat template"
        )
    asked = False
    for number, message in enumerate(messages):
        if message.role == "assistant":
            if asked:
                made.text += f" {message.text.strip()}" if message.text.strip() else ""
            else:
                made.paragraph(message.text)
            asked = False
        elif message.role == "system":
            made.paragraph(message.text)
        else:
            document, question = _question(message)
            made.paragraph(document)
            made.mark()
            if number == last:
                made.paragraph(late)
            made.text += format_question(question) if made.text else format_question(question).lstrip("\n")
            asked = True
    return made


def _question(message: Message) -> tuple[str, str]:
    """A user message's document (it may be empty) and question."""
    parts = [part.replace("\r\n", "\n") for part in message.parts if part.strip()]
    if len(parts) > 1:
        return "\n\n".join(parts[:-1]), parts[-1].strip()
    document, _, question = (parts[0] if parts else "").rstrip().rpartition("\n\n")
    return document, question.strip()


def _from_template(
    form: PromptFormat, messages: Sequence[Message], late: str, continue_final: bool, tools: Sequence[Tool]
) -> _Text:
    names = {call.id: call.name for message in messages for call in message.calls}
    turns = [_turn(m, names) for m in messages if m.role != "system" or m.text]
    offered = {"tools": [tool.as_template() for tool in tools]} if tools else {}
    last = max(n for n, turn in enumerate(turns) if turn["role"] == "user")
    content = turns[last]["content"]
    if late:
        turns[last]["content"] = f"{content}\n\n{late}"
    try:
        text = form.tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=not continue_final,
            continue_final_message=continue_final,
            **offered,
        )
        before = [
            form.tokenizer.apply_chat_template(turns[:n], tokenize=False, **offered)
            for n in (last,)
            if turns[:n]
        ]
    except jinja2.TemplateError as error:
        raise ValueError(f"messages do not fit the model's chat template: {error}") from error
    made = _Text(text)
    made.places += [len(head) for head in before if text.startswith(head)]
    found = text.rfind(content.strip())
    if found >= 0:
        made.places.append(found + len(content.strip()))
    return made


def _turn(message: Message, names: Mapping[str, str]) -> dict[str, Any]:
    """A message as chat templates read it; `names` are the tools' by the ids of their calls."""
    turn: dict[str, Any] = {"role": message.role, "content": message.text}
    if message.calls:
        turn["tool_calls"] = [call.as_template() for call in message.calls]
    if message.role == "tool":
        turn |= {"tool_call_id": message.call_id, "name": names[message.call_id]}
    return turn
