"""Files of requests, in tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

WriteFile = Callable[..., Path]
"""What the fixture `write` is: given content and perhaps a name, it writes a file and returns its path."""


def jsonl(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
