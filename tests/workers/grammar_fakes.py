"""A vocabulary for grammars: the 256 bytes, a few longer tokens, an end."""

from __future__ import annotations

from scheduling.constraints import Constraint
from scheduling.gbnf import Chars, Choice, Name, Node, Repeat, Rules, Sequence
from workers.constraints import Constraints, Matcher

TOKENS = [bytes([byte]) for byte in range(256)] + [b"ab", b"yes", b"no", b'{"', b'":', b"    ", b""]
END = len(TOKENS) - 1


def constraints(threads: int = 1) -> Constraints:
    return Constraints(len(TOKENS), TOKENS.__getitem__, [END], threads)


def accepts(matcher: Matcher, text: str) -> bool:
    """Whether `text` is whole for a fresh `matcher`. No mask is made."""
    data = text.encode()
    return matcher.native.try_consume_tokens(list(data)) == len(data) and matcher.native.is_accepting()


def allowed(one: Constraints, matcher: Matcher) -> set[bytes]:
    """The tokens that may come next, b"" for the end."""
    found = one.allowed([matcher])
    assert found is not None
    mask = found.masks[0]
    return {piece for token, piece in enumerate(TOKENS) if mask[token // 8] >> (token % 8) & 1}


def grammar(text: str) -> Constraint:
    return Constraint("grammar", text)


def language(rules: Rules, alphabet: str, longest: int) -> set[str]:
    """All texts of at most `longest` characters out of `alphabet` that `rules` mean, found by trying everything."""
    known: dict[str, set[str]] = {name: set() for name in rules}

    def join(left: set[str], right: set[str]) -> set[str]:
        return {a + b for a in left for b in right if len(a) + len(b) <= longest}

    def texts(node: Node) -> set[str]:
        if isinstance(node, Chars):
            return {sign for sign in alphabet if any(first <= ord(sign) <= last for first, last in node.ranges)}
        if isinstance(node, Name):
            return known[node.name]
        if isinstance(node, Choice):
            return set().union(*(texts(option) for option in node.options))
        if isinstance(node, Sequence):
            whole = {""}
            for part in node.parts:
                whole = join(whole, texts(part))
            return whole
        return times(node)

    def times(node: Repeat) -> set[str]:
        part, whole = texts(node.part), {""}
        for _ in range(node.least):
            whole = join(whole, part)
        left = longest if node.most is None else node.most - node.least
        for _ in range(min(left, longest)):
            whole |= join(whole, part)
        return whole

    before = -1
    while before != (before := sum(len(found) for found in known.values())):
        for name, node in rules.items():
            known[name] = texts(node)
    return known["root"]
