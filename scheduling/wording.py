"""Words of sentences that are the same everywhere."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """'1 request', '1,200 requests'."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def printable(text: object, kept: str = "") -> str:
    """What others have written, without what a terminal obeys or a page cannot hold; letters of `kept` stay, too."""
    return "".join(one if one.isprintable() or one in kept else "\N{REPLACEMENT CHARACTER}" for one in str(text))
