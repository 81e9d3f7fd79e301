"""A reader of pickles that builds plain values and records, from a closed list of names, and runs nothing.

The format is that of Python's `pickletools` (protocols 0 to 5). A name in a pickle is looked up in a table of ours and
never imported; what it stands for is one of our own functions, which only builds values. So a pickle with code in it
ends with an error that names what it asked for, or that is left unread, as `Unread`. Memory follows the bytes of the
pickle: what a pickle says of sizes is compared with what is there before anything is made, and the memo is a dict.
"""

from __future__ import annotations

import reprlib
import struct
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ckptengine.errors import CheckpointDamagedError, ForeignFormatError

__all__ = ["Maker", "Names", "Record", "Unread", "refusal", "short", "unpickle"]

Maker = Callable[..., Any]
Names = Mapping[str, Maker]
"""What the names of a pickle (`module.name`) stand for: functions that take the arguments that the pickle gives."""

_MARK = object()
_BINGET, _LONG_BINGET, _BINPUT, _LONG_BINPUT, _MEMOIZE = b"hjqr\x94"
_BININT1, _MARK_CODE, _STOP = b"K(."
_COPIES = 16
"""Items that the calls of a pickle may be handed, for each of its bytes."""
_SIZED = (str, bytes, bytearray, list, tuple, dict, set, frozenset)
_NESTED = (list, tuple, frozenset)
_HASHING = ("collections.OrderedDict", "collections.Counter", "builtins.set", "builtins.frozenset", "builtins.dict")


@dataclass(slots=True, eq=False)
class Record:
    """What a pickle says of an object of a known class: the class, the arguments, and the state that was set."""

    kind: str
    arguments: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)
    raw: Any = None


@dataclass(frozen=True, slots=True, eq=False)
class Unread:
    """What stands where a pickle has something under a name that is not in the list; nothing of it was made or run."""

    name: str


@dataclass(frozen=True, slots=True)
class _Name:
    """A name that was looked up and not called yet."""

    text: str
    make: Maker


class _Refused(Exception):
    """A name that is not in the list."""


def unpickle(
    data: bytes,
    names: Names,
    where: str,
    persistent: Callable[[Any], Any] | None = None,
    value_of: Names | None = None,
    *,
    unread: bool = False,
) -> Any:
    """Return what a pickle holds.

    `names` are the functions that may be called, `value_of` those names that stand for a value by themselves (dtypes).
    `persistent` makes what stands for something that lies outside of the pickle. `where` is for messages. With
    `unread`, an `Unread` stands for what has a name that is not in the list, wherever it lies in the pickle.

    Raises `ForeignFormatError` for a name that is not in the list, without `unread`, `CheckpointDamagedError` for what
    is no pickle.
    """
    machine = _Machine(data, names, value_of or {}, persistent, unread)
    try:
        return machine.run()
    except _Refused as refused:
        raise refusal(where, str(refused)) from None
    except IndexError:
        raise CheckpointDamagedError(f"{where}: the pickle in it can't be read: it ends too early") from None
    except (ValueError, TypeError, LookupError, struct.error, OverflowError, RecursionError) as error:
        raise CheckpointDamagedError(f"{where}: the pickle in it can't be read: {error}") from None


def short(value: Any) -> str:
    """Return a value as messages show it: whole it may be endless, since a list can be in it many times."""
    return f"{reprlib.repr(value):.80}"


def refusal(where: str, what: str) -> ForeignFormatError:
    """Return the error for what has a name that is not in the list."""
    return ForeignFormatError(
        f"{where}: holds {what}, which is not among the types of weights and plain values that are read: "
        "no code in it was run. If you trust the file, load it with the library that wrote it and save weights and "
        "plain values alone"
    )


class _Machine:
    """The stack machine that a pickle is a program of."""

    def __init__(
        self, data: bytes, names: Names, value_of: Names, persistent: Callable[[Any], Any] | None, unread: bool
    ) -> None:
        self._data, self._at = data, 0
        self._unread = unread
        self._names, self._value_of, self._persistent = names, value_of, persistent
        self._stack: list[Any] = []
        self._budget = (1 << 20) + _COPIES * len(data)
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Run the program; the instructions that are most of a large pickle are here, since a call takes longer."""
        data, codes, stack, memo, at = self._data, _CODES, self._stack, self._memo, 0
        while True:
            code = data[at]
            at += 1
            if code == _BINGET:
                stack.append(memo[data[at]])
                at += 1
            elif code == _LONG_BINGET:
                stack.append(memo[int.from_bytes(data[at : at + 4], "little")])
                at += 4
            elif code == _BINPUT:
                memo[data[at]] = stack[-1]
                at += 1
            elif code == _LONG_BINPUT:
                memo[int.from_bytes(data[at : at + 4], "little")] = stack[-1]
                at += 4
            elif code == _MEMOIZE:
                memo[len(memo)] = stack[-1]
            elif code == _BININT1:
                stack.append(data[at])
                at += 1
            elif code == _MARK_CODE:
                stack.append(_MARK)
            elif code == _STOP:
                return self._pop()
            else:
                step = codes.get(code)
                if step is None:
                    raise ValueError(f"the instruction {bytes([code])!r} at byte {at - 1} is not among those known")
                self._at = at
                step(self)
                at = self._at

    # Reading.

    def _take(self, nbytes: int) -> bytes:
        start, stop = self._at, self._at + nbytes
        if nbytes < 0 or stop > len(self._data):
            raise ValueError(f"{nbytes} bytes are missing at byte {start}")
        self._at = stop
        return self._data[start:stop]

    def _number(self, nbytes: int, *, signed: bool = False) -> int:
        return int.from_bytes(self._take(nbytes), "little", signed=signed)

    def _line(self) -> str:
        stop = self._data.find(b"\n", self._at)
        if stop < 0:
            raise ValueError("a line does not end")
        line = self._data[self._at : stop]
        self._at = stop + 1
        return line.decode()

    # The stack.

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is _MARK:
            raise ValueError("it takes more from the stack than there is")
        return self._stack.pop()

    def _top(self) -> Any:
        value = self._pop()
        self._push(value)
        return value

    def _to_mark(self) -> list[Any]:
        stack = self._stack
        for place in range(len(stack) - 1, -1, -1):
            if stack[place] is _MARK:
                found = stack[place + 1 :]
                del stack[place:]
                return found
        raise ValueError("a mark is missing")

    def _get(self, number: int) -> None:
        self._push(self._memo[number])

    def _put(self, number: int) -> None:
        self._memo[number] = self._top()

    # Containers.

    def _append(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, list | deque):
            target.extend(items)
        elif isinstance(target, set):
            self._charge(items)
            target.update(items)
        elif isinstance(target, Record):
            self._spend(len(target.arguments))
            target.arguments += tuple(items)
        elif not isinstance(target, Unread):
            raise ValueError(f"items are added to a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Unread):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise ValueError(f"keys are set in a {type(target).__name__}")
        keys = items[::2]
        self._charge(keys)
        target.update(zip(keys, items[1::2], strict=False))

    # Names and calls.

    def _name(self, module: str, name: str) -> None:
        text = f"{module}.{name}"
        text = _OLD_NAMES.get(text, text)
        if text in self._value_of:
            self._push(self._value_of[text]())
        elif text in self._names:
            self._push(_Name(text, self._names[text]))
        elif self._unread:
            self._push(Unread(text))
        else:
            raise _Refused(text)

    def _call(self, what: Any, arguments: Any, named: Mapping[str, Any] | None = None) -> None:
        if isinstance(what, Unread):
            self._push(what)
            return
        if not isinstance(what, _Name) or not isinstance(arguments, tuple) or named:
            raise ValueError("it calls what is no name of the list")
        # A call may copy what it is given; one container that is handed over again and again must not fill the memory.
        self._spend(sum(len(one) for one in arguments if isinstance(one, _SIZED)))
        if what.text in _HASHING:
            self._charge(arguments)
        self._make(what.make, *arguments)

    def _spend(self, items: int) -> None:
        self._budget -= items
        if self._budget < 0:
            raise ValueError("it goes through the same things over and over")

    def _charge(self, items: Iterable[Any]) -> None:
        """Spend what it takes to hash these: a tuple may hold one tuple twice, which does too, and so on."""
        inside = [item for item in items if type(item) in _NESTED]
        while inside:
            item = inside.pop()
            self._spend(len(item))
            inside += [part for part in item if type(part) in _NESTED]

    def _make(self, make: Maker, *arguments: Any) -> None:
        """Push what a function of ours makes; where it can't for something unread among its arguments, that."""
        try:
            made = make(*arguments)
        except (ValueError, TypeError, LookupError, AttributeError):
            made = self._unread_in(arguments, 3)
            if made is None:
                raise
        if isinstance(made, Unread) and not self._unread:
            raise _Refused(made.name)
        self._push(made)

    def _unread_in(self, value: Any, depth: int) -> Unread | None:
        """Return what is unread among arguments, or in containers of these."""
        if isinstance(value, Unread):
            return value
        if depth and isinstance(value, list | tuple):
            self._spend(len(value))
            for item in value:
                found = self._unread_in(item, depth - 1)
                if found is not None:
                    return found
        return None

    def _build(self) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Record):
            target.raw = state
            parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
            for part in parts:
                if isinstance(part, dict):
                    self._spend(len(part))
                    if all(type(key) is str for key in part):
                        target.state.update(part)
        elif isinstance(target, np.dtype):
            if not isinstance(state, tuple) or len(state) < 2 or state[1] == ">":
                raise ValueError("a numpy dtype is not little-endian")
        elif not isinstance(target, OrderedDict | Unread):  # torch hangs versions of modules on those of a state dict
            raise ValueError(f"a state is set on a {type(target).__name__}")

    def _persistent_id(self, identity: Any) -> None:
        if self._persistent is None:
            raise ValueError("it refers to something outside of it")
        self._make(self._persistent, identity)


def _list(machine: _Machine) -> None:
    machine._push(machine._to_mark())


def _dict(machine: _Machine) -> None:
    items = machine._to_mark()
    machine._push({})
    machine._set_items(items)


def _frozenset(machine: _Machine) -> None:
    items = machine._to_mark()
    machine._charge(items)
    machine._push(frozenset(items))


def _tuple(count: int) -> Callable[[_Machine], None]:
    def make(machine: _Machine) -> None:
        items = tuple(machine._stack[-count:])
        if len(items) != count or _MARK in items:
            raise ValueError("it takes more from the stack than there is")
        machine._stack[-count:] = [items]

    return make


def _text(nbytes: int) -> Callable[[_Machine], None]:
    return lambda machine: machine._push(machine._take(machine._number(nbytes)).decode("utf-8", "surrogatepass"))


def _bytes(nbytes: int) -> Callable[[_Machine], None]:
    return lambda machine: machine._push(machine._take(machine._number(nbytes)))


def _old_text(nbytes: int) -> Callable[[_Machine], None]:
    """Strings of Python 2."""
    return lambda machine: machine._push(machine._take(machine._number(nbytes)).decode("latin-1"))


def _integer(nbytes: int, signed: bool) -> Callable[[_Machine], None]:
    return lambda machine: machine._push(machine._number(nbytes, signed=signed))


def _long(nbytes: int) -> Callable[[_Machine], None]:
    return lambda machine: machine._push(machine._number(machine._number(nbytes), signed=True))


def _line_integer(machine: _Machine) -> None:
    line = machine._line()
    machine._push({"00": False, "01": True}.get(line) if line in ("00", "01") else int(line.rstrip("L")))


def _global(machine: _Machine) -> None:
    module = machine._line()
    machine._name(module, machine._line())


def _stack_global(machine: _Machine) -> None:
    name, module = machine._pop(), machine._pop()
    if type(name) is not str or type(module) is not str:
        raise ValueError("a name is no text")
    machine._name(module, name)


def _reduce(machine: _Machine) -> None:
    arguments = machine._pop()
    machine._call(machine._pop(), arguments)


def _new(machine: _Machine) -> None:
    _reduce(machine)


def _new_with_names(machine: _Machine) -> None:
    named, arguments = machine._pop(), machine._pop()
    machine._call(machine._pop(), arguments, named)


def _pop_mark(machine: _Machine) -> None:
    machine._to_mark()


def _drop(machine: _Machine) -> None:
    if not machine._stack:
        raise ValueError("it takes more from the stack than there is")
    machine._stack.pop()


def _skip(nbytes: int) -> Callable[[_Machine], None]:
    def skip(machine: _Machine) -> None:
        machine._take(nbytes)

    return skip


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine._push(value)


def _append_one(machine: _Machine) -> None:
    machine._append([machine._pop()])


def _append_many(machine: _Machine) -> None:
    machine._append(machine._to_mark())


def _set_one(machine: _Machine) -> None:
    value, key = machine._pop(), machine._pop()
    machine._set_items([key, value])


def _set_many(machine: _Machine) -> None:
    machine._set_items(machine._to_mark())


# The instructions of pickletools.opcodes, by their byte. Left out are those that make instances by calling a class with
# what lies on the stack (INST, OBJ), the registry of extensions, and buffers from outside.
_CODES: dict[int, Callable[[_Machine], None]] = {
    ord(code): step
    for code, step in {
        "\x80": _skip(1),  # PROTO
        "\x95": _skip(8),  # FRAME
        "0": _drop,
        "1": _pop_mark,
        "2": lambda machine: machine._push(machine._top()),
        "N": _constant(None),
        "\x88": _constant(True),
        "\x89": _constant(False),
        "J": _integer(4, True),
        "M": _integer(2, False),
        "\x8a": _long(1),
        "\x8b": _long(4),
        "I": _line_integer,
        "L": _line_integer,
        "G": lambda machine: machine._push(struct.unpack(">d", machine._take(8))[0]),
        "F": lambda machine: machine._push(float(machine._line())),
        "X": _text(4),
        "\x8c": _text(1),
        "\x8d": _text(8),
        "V": lambda machine: machine._push(machine._line().encode("latin-1").decode("raw-unicode-escape")),
        "B": _bytes(4),
        "C": _bytes(1),
        "\x8e": _bytes(8),
        "\x96": lambda machine: machine._push(bytearray(machine._take(machine._number(8)))),
        "T": _old_text(4),
        "U": _old_text(1),
        "]": lambda machine: machine._push([]),
        "a": _append_one,
        "e": _append_many,
        "l": _list,
        ")": _constant(()),
        "t": lambda machine: machine._push(tuple(machine._to_mark())),
        "\x85": _tuple(1),
        "\x86": _tuple(2),
        "\x87": _tuple(3),
        "}": lambda machine: machine._push({}),
        "d": _dict,
        "s": _set_one,
        "u": _set_many,
        "\x8f": lambda machine: machine._push(set()),
        "\x90": _append_many,
        "\x91": _frozenset,
        "c": _global,
        "\x93": _stack_global,
        "R": _reduce,
        "\x81": _new,
        "\x92": _new_with_names,
        "b": lambda machine: machine._build(),
        "Q": lambda machine: machine._persistent_id(machine._pop()),
        "p": lambda machine: machine._put(int(machine._line())),
        "g": lambda machine: machine._get(int(machine._line())),
    }.items()
}

_OLD_NAMES = {
    f"__builtin__.{name}": f"builtins.{name}"
    for name in ("set", "frozenset", "bytearray", "complex", "bytes", "list", "dict", "tuple", "int", "float", "str")
} | {"copy_reg._reconstructor": "copyreg._reconstructor"}
