"""Reads pickles as plain data, without importing or calling anything.

A pickle is a program for a stack machine. This executes its operations for containers and scalars
only: a function or class becomes a `Name`, a call an `Opaque`. The caller can replace calls that it
knows, such as torch's for tensors, by data. So weights are read although the file also holds
arrays, options or callbacks of other libraries.

`pickletools` of the standard library decodes the operations (protocols 0 to 5). Sizes in damaged
files allocate nothing.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO


class MalformedError(ValueError):
    """Truncated, or not a pickle that Python writes."""


@dataclass(frozen=True)
class Name:
    """A function or class in a pickle, not imported."""

    path: str
    """As in `collections.OrderedDict`."""


@dataclass(eq=False)
class Opaque:
    """Result of a call that was not executed."""

    name: str
    state: Any = None
    """State of the object: of plain objects, the dict of attributes."""


Call = Callable[[str, tuple[Any, ...]], Any]
"""(name, arguments) -> data in the place of a call; None: an `Opaque`."""

LONGEST = 1000  # characters of a function's name
_MARK = object()
_PUSHED = frozenset(
    {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"}
    | {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
    "MARK": lambda: _MARK,
}
_MADE_OF_ITEMS: dict[str, Callable[[list[Any]], Any]] = {
    "TUPLE": tuple,
    "LIST": list,
    "FROZENSET": lambda items: frozenset(map(_key, items)),
    "DICT": lambda items: dict(_entries(items)),
}
# Constructors of the oldest protocols; the class is the first argument.
_MAKERS = frozenset(
    f"{module}.{name}"
    for module in ("copyreg", "copy_reg")
    for name in ("_reconstructor", "__newobj__", "__newobj_ex__")
)
_SMALL_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_IGNORED = frozenset(("PROTO", "FRAME"))
# Errors of damaged pickles, in the parser or the machine (empty stack, unhashable key).
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, EOFError, RecursionError, OverflowError)


def read_pickle(
    stream: BinaryIO,
    call: Call = lambda name, arguments: None,
    persistent: Callable[[Any], Any] = lambda key: None,
    names: set[str] | None = None,
) -> Any:
    """The value of the pickle at the stream's position; the stream is left after it.

    Args:
        persistent: persistent ID (data outside the pickle) -> its value.
        names: receives all functions and classes in the pickle.

    Raises:
        MalformedError: damaged.
    """
    machine = _Machine(call, persistent, set() if names is None else names)
    try:
        for operation, argument, _ in pickletools.genops(stream):
            if operation.name == "STOP":
                return machine.pop()
            machine.step(operation.name, argument)
    except _DAMAGE as error:
        raise MalformedError(str(error) or type(error).__name__) from error
    raise MalformedError("it has no end")


@dataclass
class _Machine:
    """Stack and memo of one pickle."""

    call: Call
    persistent: Callable[[Any], Any]
    names: set[str]
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def step(self, name: str, argument: Any) -> None:
        """Execute one operation."""
        if name in _PUSHED:
            self.stack.append(argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _MADE_OF_ITEMS:
            self.stack.append(_MADE_OF_ITEMS[name](self.pop_items()))
        elif name in _SMALL_TUPLES:
            items = [self.pop() for _ in range(_SMALL_TUPLES[name])]
            self.stack.append(tuple(reversed(items)))
        elif name in ("STRING", "BINSTRING", "SHORT_BINSTRING"):
            self.stack.append(_text(argument))
        elif name not in _IGNORED:
            self._remember(name, argument)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise MalformedError("a mark where a value belongs")
        return value

    def pop_items(self) -> list[Any]:
        """Pop the items above the last mark, and the mark."""
        items: list[Any] = []
        while (value := self.stack.pop()) is not _MARK:
            items.append(value)
        return items[::-1]

    def top(self) -> Any:
        if self.stack[-1] is _MARK:
            raise MalformedError("a mark where a value belongs")
        return self.stack[-1]

    def _remember(self, name: str, argument: Any) -> None:
        """Operations on memo and stack."""
        if name in ("PUT", "BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.top()
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = self.top()
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name == "POP":
            self.stack.pop()
        elif name == "POP_MARK":
            self.pop_items()
        elif name == "DUP":
            self.stack.append(self.top())
        else:
            self._fill(name, argument)

    def _fill(self, name: str, argument: Any) -> None:
        """Operations that fill containers."""
        if name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = [self.pop()] if name == "APPEND" else self.pop_items()
            into = self.top()
            if isinstance(into, list):
                into.extend(items)
            elif isinstance(into, set):
                into.update(map(_key, items))
            elif not isinstance(into, Opaque):
                raise MalformedError(f"items for a {type(into).__name__}")
        elif name in ("SETITEM", "SETITEMS"):
            items = [self.pop(), self.pop()][::-1] if name == "SETITEM" else self.pop_items()
            into = self.top()
            if isinstance(into, dict):
                into.update(_entries(items))
            elif not isinstance(into, Opaque):
                raise MalformedError(f"entries for a {type(into).__name__}")
        else:
            self._objects(name, argument)

    def _objects(self, name: str, argument: Any) -> None:
        """Operations that would import, call or fill objects."""
        if name == "GLOBAL":
            self.stack.append(self._name(*argument.split(" ", 1)))
        elif name == "STACK_GLOBAL":
            last, module = self.pop(), self.pop()
            self.stack.append(self._name(module, last))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, made = self.pop(), self.pop()
            self.stack.append(self._made(made, arguments))
        elif name == "NEWOBJ_EX":
            _, arguments, made = self.pop(), self.pop(), self.pop()
            self.stack.append(self._made(made, arguments))
        elif name == "INST":
            given = tuple(self.pop_items())
            self.stack.append(self._made(self._name(*argument.split(" ", 1)), given))
        elif name == "OBJ":
            made, *rest = self.pop_items()
            self.stack.append(self._made(made, tuple(rest)))
        elif name == "BUILD":
            state = self.pop()
            if isinstance(into := self.top(), Opaque):
                into.state = state
        elif name in ("PERSID", "BINPERSID"):
            self.stack.append(self.persistent(self.pop() if name == "BINPERSID" else argument))
        else:  # extension codes and out-of-band buffers
            raise MalformedError(f"{name}, which needs more than the file")

    def _name(self, module: Any, name: Any) -> Name:
        if not isinstance(module, str) or not isinstance(name, str):
            raise MalformedError("a name that is no text")
        path = f"{module}.{name}"
        if len(path) > LONGEST or not path.isprintable():
            raise MalformedError("a name that no function has")
        self.names.add(path)
        return Name(path)

    def _made(self, made: Any, arguments: Any) -> Any:
        if not isinstance(arguments, tuple):
            raise MalformedError("arguments that are no tuple")
        if isinstance(made, Opaque):  # a call of a call's result
            return Opaque(made.name)
        if not isinstance(made, Name):
            raise MalformedError(f"a call of a {type(made).__name__}")
        if made.path in _MAKERS and arguments and isinstance(arguments[0], Name):
            return Opaque(arguments[0].path)
        answer = self.call(made.path, arguments)
        return Opaque(made.path) if answer is None else answer


def _entries(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    """Pairs of alternating keys and values."""
    for key, value in zip(items[::2], items[1::2], strict=True):
        yield _key(key), value


def _key(value: Any) -> Any:
    """A hashable value. Hashing deeply nested tuples would crash the process."""
    nests = (tuple, frozenset)
    deep = isinstance(value, nests) and any(isinstance(part, nests) for part in value)
    return Opaque(type(value).__name__) if deep else value


def _text(argument: str) -> str:
    """A string of Python 2, text or bytes: decoded as UTF-8 if possible."""
    try:
        return argument.encode("latin-1").decode("utf-8")
    except UnicodeError:
        return argument
