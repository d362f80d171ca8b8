"""Values read as lines of input, in tests."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scheduling.errors import RequestError
from scheduling.requests import Request, parse_request

CHAT = {"messages": [{"role": "user", "content": "Hello"}]}


def parse(value: object, **kwargs: Any) -> Request:
    kwargs.setdefault("default_id", "d")
    return parse_request(json.dumps(value).encode(), **kwargs)


def refusal(value: object, **kwargs: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse_request(value, **kwargs) if isinstance(value, bytes) else parse(value, **kwargs)
    return caught.value
