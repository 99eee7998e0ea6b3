"""What a module declares at its top, read off its text: names, texts and options without the seconds that torch takes.

Only what follows from literals, from each other and from light modules is read; a class keeps its docstring and its
fields. Where more is needed the module is imported after all, so the answer is the same, but slow.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import functools
import importlib
import re
import traceback
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

from ulrl.errors import UserError

LIGHT = ("ulrl.options", "dataclasses", "typing", "collections.abc", "pathlib")  # imported as they are
REGISTERED = re.compile(r"""^@(?:\w+\.)?register\(\s*["']([^"']+)["'].*?^class (\w+)""", re.M | re.S)


def declared(module: str, name: str) -> Any:
    """The constant, or the class as a dataclass of its fields alone, of that name in a module.

    Raises:
        UserError: as `imported`.
    """
    try:
        value = _module(module).value(name)
        if isinstance(value, type):
            typing.get_type_hints(value)  # of types that the module imports, they are not known here
        return value
    except Exception:  # whatever stands there that is more than a declaration
        return getattr(imported(module), name)


def imported(module: str) -> ModuleType:
    """
    Raises:
        UserError: it cannot be imported, as a method that is being written; the message says where it fails.
    """
    try:
        return importlib.import_module(module)
    except UserError:
        raise
    except Exception as error:
        file = str(_file(module))
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        if isinstance(error, SyntaxError) and error.filename == file:
            lines.append(error.lineno)
        line = lines[-1] if lines else "?"
        raise UserError(
            f"{file}, line {line}: {type(error).__name__}: {error}; mend it, or move the file away"
        ) from error


def methods(package: str) -> dict[str, tuple[str, str]]:
    """The registered classes of a package, by the name that users type: (module, class).

    Raises:
        UserError: two have the same name.
    """
    found: dict[str, tuple[str, str]] = {}
    for file in _file(package).parent.glob("*.py"):
        for name, cls in REGISTERED.findall(file.read_text(encoding="utf-8")):
            if name in found:
                raise UserError(f"{file} registers {name!r}, as {found[name][0]} does; give one of them another name")
            found[name] = (f"{package}.{file.stem}", cls)
    return dict(sorted(found.items()))


def about(module: str) -> str:
    """The docstring of a module."""
    before_imports = _file(module).read_text(encoding="utf-8").partition("\nfrom __future__")[0]  # quicker to parse
    return ast.get_docstring(ast.parse(before_imports)) or ""


def keys(module: str, name: str) -> list[str]:
    """The keys of a mapping that a module declares, whatever its values are."""
    node = _module(module).nodes[name]
    assert isinstance(node, ast.Dict)
    return [ast.literal_eval(key) for key in node.keys if key is not None]


class _Module:
    def __init__(self, name: str) -> None:
        self.nodes: dict[str, ast.stmt | ast.expr] = {}  # what each name is bound to
        self._values: dict[str, Any] = {}
        for node in ast.parse(_file(name).read_text(encoding="utf-8")).body:
            match node:
                case ast.ImportFrom():
                    self.nodes |= {alias.asname or alias.name: node for alias in node.names}
                case ast.ClassDef():
                    self.nodes[node.name] = node
                case ast.Assign(targets=[ast.Name(id=target)], value=expression):
                    self.nodes[target] = expression
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=ast.Tuple(elts=expressions)):
                    self.nodes |= zip((ast.unparse(target) for target in targets), expressions, strict=True)

    def value(self, name: str) -> Any:
        if name not in self._values:
            match self.nodes.get(name):
                case ast.ImportFrom(module=str(source), names=aliases):
                    original = next(alias.name for alias in aliases if name in (alias.asname, alias.name))
                    light = source in LIGHT
                    value = getattr(importlib.import_module(source), original) if light else declared(source, original)
                case ast.ClassDef() as node:
                    value = self._class(node)
                case ast.expr() as expression:
                    value = self._evaluated(expression)
                case _:
                    value = getattr(builtins, name)
            self._values[name] = value
        return self._values[name]

    def _evaluated(self, expression: ast.expr) -> Any:
        names = [node for node in ast.walk(expression) if isinstance(node, ast.Name)]
        own = {node.id for node in names if isinstance(node.ctx, ast.Store)}  # of a comprehension
        known = {node.id: self.value(node.id) for node in names if node.id not in own}
        return eval(compile(ast.Expression(expression), "<declared>", "eval"), known)

    def _class(self, node: ast.ClassDef) -> type:
        content: dict[str, Any] = {"__doc__": ast.get_docstring(node, clean=False), "__annotations__": {}}
        for line in node.body:
            match line:
                case ast.AnnAssign(target=ast.Name(id=field), annotation=annotation, value=value):
                    if "ClassVar" not in (written := ast.unparse(annotation)):
                        is_option = isinstance(value, ast.Call) and ast.unparse(value.func) == "option"
                        content["__annotations__"][field] = written if is_option else "object"  # torch's types perhaps
                    if value is not None:
                        content[field] = self._evaluated(value)
        bases = tuple(self._evaluated(base) for base in node.bases)
        return dataclasses.dataclass(frozen=True)(type(node.name, bases, content))


@functools.cache
def _module(name: str) -> _Module:
    return _Module(name)


def _file(module: str) -> Path:
    """Where a module of this package lies."""
    base = Path(__file__).parent.joinpath(*module.split(".")[1:])
    return base / "__init__.py" if base.is_dir() else base.with_suffix(".py")
