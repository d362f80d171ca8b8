"""Long texts tokenised where they can do no harm: in a process that may die of it (`workers.confined`).

Where a model's rules for words have no code of their own in llama.cpp, regular expressions do the work that recurse for
each character of a word: 40,000 letters in a row overflow the stack. A word's tokens are found by joining pairs, which
takes seconds and a gigabyte for ten million letters. Texts as people write them take neither, however long.

    the engine        `LongTexts.tokenize`: for texts of more than LONG_CHARACTERS
    the process       the vocabulary alone is loaded, on no GPU; texts in, token ids out
"""

from __future__ import annotations

import numpy as np

from scheduling.errors import RequestError
from scheduling.requests import Request
from workers.confined import Confined, on_stack, serve, tie_to_engine, why_died
from workers.frames import read_frame

LONG_CHARACTERS = 1 << 16
"""Shorter ones need at most about 25 MiB of stack (see `PREPARING_STACK_BYTES`)."""
PREPARING_STACK_BYTES = 64 << 20
"""For the threads that tokenise what is not long."""
TOKENIZE_S = 10.0
TOKENIZE_BYTES = 2 << 30
STACK_BYTES = 1 << 30

_NO_GPU = {
    "CUDA_VISIBLE_DEVICES": "-1",
    "HIP_VISIBLE_DEVICES": "-1",
    "ROCR_VISIBLE_DEVICES": "-1",
    "GGML_VK_VISIBLE_DEVICES": "",
}


def longest_text(request: Request) -> int:
    """Characters of the longest of a request's texts, about: what a chat's template puts around them is not counted."""
    texts: list[str | tuple[int, ...]] = [request.prompt, *request.inputs, *request.continuations]
    chat = sum(len(message.content) for message in request.messages)
    return max(chat, *(len(text) for text in texts if isinstance(text, str)), 0)


class LongTexts:
    """The tokenizer of one model's file, in a process of its own that starts with the first long text. A text may take
    `seconds` of processor time."""

    def __init__(self, model: str, seconds: float = TOKENIZE_S) -> None:
        self._seconds = seconds
        self._process = Confined("workers.longtexts", f"{seconds:g} {model}".encode(), _NO_GPU)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`. Raises `RequestError` if that takes more than is allowed."""
        question = bytes([add_special, parse_special]) + text.encode("utf-8", "replace")
        try:
            said = self._process.ask(question)
        except OSError as error:
            raise RequestError(f"no process can be started to tokenise a long text: {error}") from error
        if said is None:
            why = why_died(
                self._process.last_code, "tokenising it", seconds=self._seconds, more_bytes=TOKENIZE_BYTES,
                overflow="it has a word that is longer than llama.cpp can take",
            )  # fmt: skip
            raise RequestError(f"a text of {len(text)} characters cannot be used: {why}")
        ids: list[int] = np.frombuffer(said, np.int32).tolist()
        return ids

    def close(self) -> None:
        """End the process, if there is one."""
        self._process.close()


# ---------------------------------------------------------------- the process


def main() -> None:
    tie_to_engine()
    body = read_frame(0)
    if body is None:
        return
    from workers.llama import LlamaTokenizer

    seconds, _, model = body.decode().partition(" ")
    tokenizer = LlamaTokenizer.of_file(model)

    def tokens(question: bytes) -> bytes:
        add_special, parse_special = bool(question[0]), bool(question[1])
        text = question[2:].decode()
        ids = tokenizer.tokenize(text, add_special=add_special, parse_special=parse_special)
        return np.array(ids, np.int32).tobytes()

    serve(
        lambda question: on_stack(STACK_BYTES, lambda: tokens(question)), seconds=float(seconds),
        more_bytes=TOKENIZE_BYTES + STACK_BYTES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
