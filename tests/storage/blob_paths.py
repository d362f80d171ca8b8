"""Finds, in Python source, what makes the path of a blob: by `/`, `+`, f-strings, `format`, `%`, `join` and the like.

Every expression is folded to the text that it would give, with a hole for what only a run knows. A text that has
`blobs` for a whole part of a path, or `sha256-`, is a way to a blob; so is turning the colon of a digest into a dash.
What a function gets as an argument is not followed.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping

HOLE = "\0"
_WAY = re.compile(r"(?<![^/\\\0])blobs(?![^/\\\0])|sha256-")
_NAMED = {"ALGORITHM": "sha256", "file_name": f"sha256-{HOLE}"}
"""What `storage.digest` gives others."""
_JOINING = ("join", "joinpath", "with_name", "Path", "PurePath")


def ways_to_blobs(source: str) -> dict[str, list[int]]:
    """The functions of `source` that make paths of blobs, each with the lines where; '' is the module itself."""
    tree = ast.parse(source)
    constants = {
        node.targets[0].id: node.value.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }  # fmt: skip
    found: dict[str, list[int]] = {}
    for function, node in _expressions(tree, ""):
        if _WAY.search(_folded(node, _NAMED | constants)) or _makes_a_dash(node):
            found.setdefault(function, []).append(node.lineno)
    return {function: sorted(set(lines)) for function, lines in found.items()}


def _expressions(node: ast.AST, function: str) -> Iterator[tuple[str, ast.expr]]:
    """All but texts that stand alone, as docstrings do; each with the name of its innermost function."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
            continue
        if isinstance(child, ast.expr):
            yield function, child
        inner = child.name if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)) else function
        yield from _expressions(child, inner)


def _folded(node: ast.expr | None, constants: Mapping[str, str]) -> str:
    def fold(inner: ast.expr) -> str:
        return _folded(inner, constants)

    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(map(fold, parts))
        case ast.FormattedValue(value=value):
            return fold(value)
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return constants.get(name, HOLE)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return fold(left) + fold(right)
        case ast.BinOp(left=left, op=ast.Div(), right=right):
            return f"{fold(left)}/{fold(right)}"
        case ast.BinOp(left=left, op=ast.Mod(), right=right):
            values = right.elts if isinstance(right, ast.Tuple) else [right]
            return _filled(r"%\(?\w*\)?[sdr]", fold(left), list(map(fold, values)))
        case ast.Call(func=ast.Attribute(value=text, attr="format"), args=args, keywords=keywords):
            return _filled(r"\{[^{}]*\}", fold(text), [*map(fold, args), *(fold(one.value) for one in keywords)])
        case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name), args=args) if name in _JOINING:
            return _joined(node, args, fold)
    return HOLE


def _joined(call: ast.Call, args: list[ast.expr], fold: Callable[[ast.expr], str]) -> str:
    """Of `os.path.join(a, b)`, `Path(a, b)` and `path.joinpath(a)`; of `"/".join((a, b))`."""
    if len(args) == 1 and isinstance(args[0], (ast.Tuple, ast.List)) and isinstance(call.func, ast.Attribute):
        return fold(call.func.value).join(map(fold, args[0].elts))
    return "/".join(map(fold, args))


def _filled(place: str, text: str, values: list[str]) -> str:
    """`text` with the next value at each `place`: in their order, whatever the places are called."""
    left = iter(values)
    return re.sub(place, lambda _: next(left, HOLE), text)


def _makes_a_dash(node: ast.expr) -> bool:
    match node:
        case ast.Call(func=ast.Attribute(attr="replace"), args=[ast.Constant(value=":"), ast.Constant(value="-"), *_]):
            return True
    return False
