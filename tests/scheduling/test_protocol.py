"""The number of the protocol stands for the shapes of all messages."""

from __future__ import annotations

import hashlib

import msgspec

from scheduling import messages as m

SHAPES = (7, "92f159b52806fbe1")
"""The number, and the digest of what the messages look like with it."""


def test_messages_that_have_changed_have_another_number() -> None:
    shapes = [
        (name, of.__struct_config__.tag, of.__struct_config__.array_like, list(of.__annotations__.items()))
        for name, of in sorted(vars(m).items())
        if isinstance(of, type) and issubclass(of, msgspec.Struct)
    ]
    assert len(shapes) > 20
    digest = hashlib.sha256(repr(shapes).encode()).hexdigest()[:16]
    assert (m.PROTOCOL_VERSION, digest) == SHAPES, "raise PROTOCOL_VERSION with every change, then note both here"
