"""Chat templates: from messages to the parts of a prompt.

The template is the model's own (from the GGUF) or one that the user gave, in jinja2's immutable sandbox with the
extensions and helpers that templates in the wild expect. Without either, ChatML is used. A sandbox keeps a template
from files and objects, not from time and memory: the engine has it rendered in a process of its own
(`workers.rendering`).

What a user wrote must stay text: if a message contains the text of a control token ("<|im_end|>"), the template is
rendered around placeholders and each message is a part of its own, in which control tokens are not recognised.
Otherwise the rendered whole is one part, tokenised at once, which is what the model was trained on.

This module knows no llama.cpp. Only the process that renders loads it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from scheduling.errors import RequestError
from scheduling.requests import Message
from workers.promptparts import Part

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Private-use characters: no template has a reason to touch them, and leftovers show that one did.
_OPEN, _CLOSE = "\uf8f0", "\uf8f1"
_PLACEHOLDER = re.compile(f"{_OPEN}([0-9]+){_CLOSE}")


class _GenerationTag(Extension):
    """{% generation %} marks training targets; here its body is simply rendered."""

    tags = {"generation"}  # noqa: RUF012  (jinja2 declares it so)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        parser.stream.skip(1)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # jinja2's own filter escapes <, > and & for HTML, which models have never seen.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class ChatTemplate:
    """One template, compiled. Templates write BOS themselves; before ChatML the tokenizer adds the model's."""

    def __init__(self, source: str | None, *, bos: str = "", eos: str = "", control_texts: Sequence[str] = ()) -> None:
        """`source` None is ChatML. A template that cannot be compiled fails those who use it, and `check`."""
        self._add_special = source is None
        self._names = {"bos_token": bos, "eos_token": eos}
        texts = sorted((text for text in control_texts if text), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, texts))) if texts else None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template: jinja2.Template | None = None
        self._broken = ""
        try:
            self._template = environment.from_string(CHATML if source is None else source)
        except Exception as error:  # also what the compiler does not expect: recursion too deep, for one
            self._broken = f"the chat template cannot be compiled: {_reason(error)}"

    def check(self) -> None:
        """Raises `RequestError` if the template cannot be compiled."""
        if self._template is None:
            raise RequestError(self._broken, "messages")

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt as text, ready for the assistant's turn. Raises `RequestError` if the template fails."""
        return self._render(messages, [message.content for message in messages])

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """The prompt in parts, most often one. Raises `RequestError` if the template fails."""
        if not any(self._has_control_text(message) for message in messages):
            return [Part(self.render(messages), self._add_special, True)]
        return self._parts_apart(messages)

    def _has_control_text(self, message: Message) -> bool:
        if self._control is None:
            return False
        for label in (message.role, message.name or ""):
            if self._control.search(label):
                raise RequestError(f"the role or name {label!r} contains the text of a control token", "messages")
        return self._control.search(message.content) is not None

    def _parts_apart(self, messages: Sequence[Message]) -> list[Part]:
        for message in messages:
            if _OPEN in message.content or _CLOSE in message.content:
                raise RequestError(
                    "a message contains both the text of a control token and the private-use characters "
                    "U+F8F0 or U+F8F1, and cannot be kept apart from the template",
                    "messages",
                )
        rendered = self._render(messages, [f"{_OPEN}{place}{_CLOSE}" for place in range(len(messages))])
        parts: list[Part] = []
        for number, part in enumerate(_PLACEHOLDER.split(rendered)):
            if number % 2:
                parts.append(Part(messages[int(part)].content, False, False))
                continue
            if _OPEN in part or _CLOSE in part:
                raise RequestError(
                    "a message contains the text of a control token, and this chat template takes messages apart, "
                    "so that it cannot be kept as text; remove it from the message",
                    "messages",
                )
            add_special = self._add_special and number == 0
            if part or add_special:
                parts.append(Part(part, add_special, True))
        return parts

    def _render(self, messages: Sequence[Message], contents: Sequence[str]) -> str:
        if self._template is None:
            raise RequestError(self._broken, "messages")
        turns: list[dict[str, str]] = []
        for message, content in zip(messages, contents, strict=True):
            turn = {"role": message.role, "content": content}
            if message.name is not None:
                turn["name"] = message.name
            turns.append(turn)
        try:
            return self._template.render(messages=turns, add_generation_prompt=True, **self._names)
        except Exception as error:  # a template is a program of someone else's: it can raise anything
            raise RequestError(f"the chat template failed: {_reason(error)}", "messages") from error


def _reason(error: Exception) -> str:
    return "it takes too much memory" if isinstance(error, MemoryError) else str(error) or type(error).__name__
