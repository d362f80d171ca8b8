"""Chat templates rendered where they can do no harm: in a process that may die of it (`workers.confined`).

A template comes with a model's file, from whoever made that. The sandbox of `workers.chat` keeps it from everything
but its arguments; here it is kept from time and memory as well. It also costs the engine's stepping threads nothing:
they need the Python lock that rendering would hold.

    the engine        `ConfinedTemplate.parts(messages)`: the prompt in parts
    the process       first what the template is, then messages in, parts or what is wrong out
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from scheduling.errors import RequestError
from scheduling.requests import Message
from workers.confined import Confined, serve, tie_to_engine, why_died
from workers.frames import read_frame
from workers.promptparts import Part

if TYPE_CHECKING:
    from workers.chat import ChatTemplate

RENDER_S = 2.0
"""Of processor time. Most templates take less than a thousandth of it."""
RENDER_BYTES = 512 << 20
PROMPT_BYTES_MAX = 64 << 20
"""As much as a line of the input may have."""
DEATHS_MAX = 5
"""After so many in a row a template is not tried again: each costs its time, and a file has a million chats."""


class TemplateSource(msgspec.Struct, frozen=True):
    """What a template is made of. See `ChatTemplate`."""

    source: str | None
    bos: str
    eos: str
    control_texts: tuple[str, ...]

    def template(self) -> ChatTemplate:
        from workers.chat import ChatTemplate

        return ChatTemplate(self.source, bos=self.bos, eos=self.eos, control_texts=self.control_texts)


class Rendered(msgspec.Struct, frozen=True):
    """The answer to messages. `error`: why there are no parts."""

    parts: list[Part] = []
    error: str = ""
    param: str | None = None


_ENCODER = msgspec.msgpack.Encoder()
_RENDERED = msgspec.msgpack.Decoder(Rendered)
_MESSAGES = msgspec.msgpack.Decoder(tuple[Message, ...])
_SOURCE = msgspec.msgpack.Decoder(TemplateSource)


class ConfinedTemplate:
    """A `workers.promptparts.Template` that is rendered in a process of its own."""

    def __init__(self, source: TemplateSource) -> None:
        self._process = Confined("workers.rendering", _ENCODER.encode(source))
        self._deaths = 0
        self._died_of = ""

    def check(self) -> None:
        self._ask(())

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        return self._ask(tuple(messages))

    def _ask(self, messages: tuple[Message, ...]) -> list[Part]:
        if self._deaths >= DEATHS_MAX:
            raise RequestError(f"{self._died_of}, {DEATHS_MAX} times in a row: it is not tried again", "messages")
        try:
            said = self._process.ask(_ENCODER.encode(messages))
        except OSError as error:
            raise RequestError(f"no process can be started for the chat template: {error}", "messages") from error
        if said is None:
            self._deaths += 1
            why = why_died(
                self._process.last_code, "rendering it", seconds=RENDER_S, more_bytes=RENDER_BYTES,
                overflow="its parts are nested too deeply",
            )  # fmt: skip
            self._died_of = f"the chat template cannot be used: {why}"
            raise RequestError(self._died_of, "messages")
        self._deaths = 0
        answer = _RENDERED.decode(said)
        if answer.error:
            raise RequestError(answer.error, answer.param)
        return answer.parts

    def close(self) -> None:
        """End the process, if there is one."""
        self._process.close()


# ---------------------------------------------------------------- the process


def _answer(template: ChatTemplate, question: bytes) -> bytes:
    messages = _MESSAGES.decode(question)
    try:
        if not messages:
            template.check()
            return _ENCODER.encode(Rendered())
        parts = template.parts(messages)
        if sum(len(part.text) for part in parts) > PROMPT_BYTES_MAX:
            raise RequestError(f"the chat template makes a prompt of over {PROMPT_BYTES_MAX >> 20} MiB", "messages")
        return _ENCODER.encode(Rendered(parts))
    except UnicodeEncodeError:
        return _ENCODER.encode(Rendered([], "the chat template makes what is no text: half of a character", "messages"))
    except RequestError as error:
        return _ENCODER.encode(Rendered([], str(error), error.param))


def main() -> None:
    tie_to_engine()
    body = read_frame(0)
    if body is None:
        return
    from workers import chat  # noqa: F401  (before memory is limited)

    # Made with the first question: a template can take its time to be compiled, too.
    made: list[ChatTemplate] = []

    def answer(question: bytes) -> bytes:
        if not made:
            made.append(_SOURCE.decode(body).template())
        return _answer(made[0], question)

    serve(answer, seconds=RENDER_S, more_bytes=RENDER_BYTES)


if __name__ == "__main__":
    main()
