"""Compiling a grammar where it can do no harm: in a process that may die of it (`workers.confined`).

llguidance bounds nearly all that it does, but compiling a schema of 4 KiB can still take 8 GiB, another minutes, and a
chain of 1,500 references overflows the stack. Nothing can stop a native call but the end of its process. So each new
grammar is compiled here first, with a limit on processor time, memory and stack. One that comes through compiles in
the engine as well: there it does the same again, with more room.

    the engine        `Trial.reason(grammar)`: why it cannot be used, "" if it can
    the process       grammars in, reasons out
"""

from __future__ import annotations

import re
import signal

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from workers.confined import Confined, on_stack, serve, tie_to_engine, why_died

COMPILE_S = 3.0
"""Of processor time."""
COMPILE_BYTES = 256 << 20
STACK_BYTES = 16 << 20

LIMITS = LLParserLimits(
    # Rules over single characters make many items. A mask takes at most about their number squared times 80 ps.
    step_max_items=100_000,
    max_items_in_row=10_000,
    # About 2 KiB each, kept as long as the grammar is.
    max_lexer_states=50_000,
    verbose_errors=False,
)


class Trial:
    """Says whether grammars can be compiled."""

    def __init__(self) -> None:
        self._process = Confined("workers.trial")

    def reason(self, grammar: str) -> str:
        """Why `grammar`, in llguidance's Lark, cannot be compiled within the limits; "" if it can."""
        said = self._process.ask(grammar.encode())
        if said is None and not self._process.fresh and self._process.last_code == -signal.SIGABRT:
            said = self._process.ask(grammar.encode())  # what came before may have left little memory
        if said is None:
            return why_died(
                self._process.last_code, "compiling it", seconds=COMPILE_S, more_bytes=COMPILE_BYTES,
                overflow="its parts are nested too deeply",
            )  # fmt: skip
        return said.decode()

    def close(self) -> None:
        self._process.close()


def in_plain_words(error: str) -> str:
    """What llguidance says is wrong, without places in a notation that nobody has written and without its marks."""
    if "NoExtensionBias" in error:
        return "no text at all can satisfy it"
    if "oneOf constraints" in error:
        return "oneOf works only where no two of its options can hold at once; anyOf always does"
    if re.search("too many expressions|fuel exhausted|configuration \\(grammar\\) too big", error):
        return "it is too complex"
    if "regex for float range" in error:
        return "a bound of a number is too large: they go up to 9e18"
    if re.search("%json.*number out of range", error):
        return "a number in it is too large"
    if "invalid multiple of" in error:
        return "multipleOf must be a number above 0"
    lines = [line.strip() for line in error.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("<", "^"))] or ["unknown error"]
    text = re.sub(r"^(at )?\d+\(\d+\): |failed to compile JSON schema: ", "", lines[0])
    why = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if why:  # a regular expression, with a mark where it is wrong
        text = f"{text} {why[0]}"
    if unknown := re.fullmatch(r"Unimplemented keys: \[(.*)\]", text):
        return f"keywords that are not supported: {unknown[1]}"
    return re.sub(r" is not present in a registry and .*", " is not in the schema, and none is fetched", text)


# ---------------------------------------------------------------- the process


class _Bytes:
    """A vocabulary of the 256 bytes and an end, for `TokenizerWrapper`."""

    tokens = (*(bytes([byte]) for byte in range(256)), b"\xff<end>")
    eos_token_id = 256
    bos_token_id = None
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def byte_tokenizer() -> LLTokenizer:
    """Enough to compile with: a model's vocabulary changes masks, not grammars."""
    return LLTokenizer(TokenizerWrapper(_Bytes()))


def _compile(tokenizer: LLTokenizer, grammar: str) -> str:
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
    if not matcher.is_error():
        matcher.compute_bitmask()
    return in_plain_words(matcher.get_error()) if matcher.is_error() else ""


def main() -> None:
    tie_to_engine()
    tokenizer = byte_tokenizer()

    def answer(question: bytes) -> bytes:
        return on_stack(STACK_BYTES, lambda: _compile(tokenizer, question.decode())).encode()

    serve(answer, seconds=COMPILE_S, more_bytes=COMPILE_BYTES + STACK_BYTES)


if __name__ == "__main__":
    main()
