"""Checks of a pickle before it is loaded: the calls in it, the keys of its dictionaries, and the work.

PyTorch's unpickler runs no code of a file, but does everything else that the file says, and calls every class and
function that it knows with any arguments: storages of uninitialized memory, codecs that double a text each time. A
hundred bytes can ask for a tuple of tuples of tuples …, each the same twice, which is hashed 2⁶⁰ times. Here the
instructions are followed with a `Value`, a kind and a count, in place of each value. A pickle that cannot be followed
to its end is refused.
"""

import pickle
import re
import struct
from collections.abc import Sequence
from typing import BinaryIO

# Values and instructions; a tensor takes about 35, so that this is 14,000 tensors. Each use of a value counts anew.
MOST = 500_000
DEEPEST = 100  # tuples, lists, dictionaries and arguments of calls in each other; a checkpoint has about ten
STAND_IN = 20  # values that the name, call or state of a stand-in takes as long as: PyTorch lists all of them each time
PROTOCOL = 3  # PyTorch's reader refuses instructions of later ones
TEXT_BYTES = 64  # of a text that count as a further value where it is used again
# Numbers and tuples are hashed alike in every process, so that a file can choose keys for which a dictionary takes
# quadratic time; a file cannot know the hashes of texts. Integers below FREE_KEYS are too few for that: seconds.
FREE_KEYS = 2**17
MOST_KEYS = 2_000  # others: ids of parameters in optimizers of PyTorch before 1.5, pairs of names

MARK, STOP, GLOBAL, TUPLE = pickle.MARK[0], pickle.STOP[0], pickle.GLOBAL[0], pickle.TUPLE[0]
NEWOBJ, REDUCE, BUILD, LONG1 = pickle.NEWOBJ[0], pickle.REDUCE[0], pickle.BUILD[0], pickle.LONG1[0]
PUTS = {pickle.BINPUT[0]: "<B", pickle.LONG_BINPUT[0]: "<I"}
GETS = {pickle.BINGET[0]: "<B", pickle.LONG_BINGET[0]: "<I"}
NUMBERS = {pickle.BININT[0]: "<i", pickle.BININT1[0]: "<B", pickle.BININT2[0]: "<H", pickle.BINFLOAT[0]: ">q"}
TEXTS = {pickle.BINUNICODE[0]: "<I", pickle.SHORT_BINSTRING[0]: "<B"}  # format of the length
EMPTY = {
    pickle.NONE[0]: "none",
    pickle.NEWFALSE[0]: "truth",
    pickle.NEWTRUE[0]: "truth",
    pickle.EMPTY_TUPLE[0]: "tuple",
    pickle.EMPTY_LIST[0]: "list",
    pickle.EMPTY_DICT[0]: "dict",
    pickle.EMPTY_SET[0]: "set",
}
TUPLES = {pickle.TUPLE1[0]: 1, pickle.TUPLE2[0]: 2, pickle.TUPLE3[0]: 3}

FREE = {"text", "codec", "truth", "none"}  # kinds of a dictionary's keys of which there may be any number
KEYS = {*FREE, "number"}  # kinds of keys and of what is in a tuple that is one: hashed and printed in no time
CODECS = {b"latin1", b"latin-1"}  # by which Python writes bytes
SAVED = "text global text text number( (none|tuple|numbers))?"  # reference to a storage of the file
# Functions and classes that a pickle may call: kinds of the arguments, and of the result; "numbers" is a tuple of
# numbers, "row" a list of them. All others are refused; they may be arguments, such as the class of a storage, and
# values. Tensors are nowhere but where they belong: PyTorch prints what is wrong, and a tensor of one number may be
# expanded to a trillion.
CALLS = {
    "torch._utils._rebuild_tensor": ("storage number numbers numbers", "tensor"),
    "torch._utils._rebuild_tensor_v2": ("storage number numbers numbers truth ordered( (dict|none))?", "tensor"),
    "torch._utils._rebuild_tensor_v3": ("storage number numbers numbers truth ordered global( (dict|none))?", "tensor"),
    "torch._utils._rebuild_sparse_tensor": ("layout tuple", "tensor"),
    "torch._utils._rebuild_nested_tensor": ("tensor tensor tensor tensor", "tensor"),
    "torch._utils._rebuild_meta_tensor_no_storage": ("global numbers numbers truth", "tensor"),
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": ("tensor global text truth", "tensor"),
    "torch._utils._rebuild_parameter": ("tensor truth ordered", "tensor"),
    "torch._utils._rebuild_parameter_with_state": ("tensor truth ordered dict", "tensor"),
    "torch._tensor._rebuild_from_type_v2": (
        "global global (tuple|numbers) dict",
        "tensor",
    ),  # calls the first with the third
    "torch.serialization._get_layout": ("text", "layout"),
    "torch.Size": ("numbers|row", "size"),
    "torch.device": ("text( number)?", "device"),
    "collections.OrderedDict": ("(list|row)?", "ordered"),  # Python 2 writes a list of pairs
    "collections.Counter": ("(dict)?", "counter"),
    "builtins.set": ("(list|row)?", "set"),
    "builtins.bytearray": ("(bytes|(text|codec) codec)?", "bytes"),
    "builtins.complex": ("number number", "complex"),
    "_codecs.encode": ("(text|codec) codec", "bytes"),  # bytes
}
# Of some of them: the place of a tuple among the arguments, and the kinds in it.
INNER = {
    "torch._utils._rebuild_sparse_tensor": (1, "tensor tensor (tensor )?(size|numbers)( (truth|none))?"),
}
FROM_TYPE, BYTES_IO = "torch._tensor._rebuild_from_type_v2", "_io.BytesIO"
QUANTIZED = "torch._utils._rebuild_qtensor"  # copies scales, which may be one number that is repeated
STAND_INS = ("numpy.", BYTES_IO)  # beginnings of names in whose place the reader makes objects that do nothing


class RefusedError(ValueError):
    """Error for a pickle that asks for more work than any checkpoint does, or for what no checkpoint does."""


class Value:
    """Knowledge of a value: its kind, the name of a global, the values in a tuple or list or the keys of a dictionary,
    of how many it consists, and how deeply it is nested.

    free: an integer that may be a key any number of times. whole: a value that was used again, and grows no more.
    """

    __slots__ = ("count", "depth", "free", "items", "kind", "name", "whole")

    def __init__(self, kind: str, count: int = 1, depth: int = 0, name: str = "", items: "Sequence[Value]" = ()):
        self.kind, self.count, self.depth, self.name, self.items = kind, count, depth, name, items
        self.free, self.whole = kind in FREE, False


def check_pickle(content: BinaryIO, most: int = MOST, before: int = 0) -> int:
    """Number of values that loading the pickle at the position of a file would take, and those `before` it.

    Raises RefusedError if they are more than `most`, or nested more than DEEPEST deep, and for calls and keys that no
    checkpoint has; UnpicklingError for instructions that PyTorch's unpickler refuses; EOFError, IndexError, KeyError
    and struct.error for a damaged pickle.
    """
    follower = Follower(content, most, before)
    follower.follow()
    return follower.total


class Follower:
    """Follows a pickle's instructions as the unpickler does, with `Value` in place of values."""

    def __init__(self, content: BinaryIO, most: int, before: int = 0):
        self.content, self.most, self.total, self.before = content, most, before, before
        self.stack: list[Value] = []
        self.marks: list[list[Value]] = []
        self.memo: dict[int, Value] = {}
        self.keys = 0  # that are not free

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.content.read(struct.calcsize(form)))[0])

    def used(self, count: int) -> None:
        """Add to the total; raises RefusedError if it is too large."""
        self.total += count
        if self.total > self.most:
            together = ", with what was read before it" if self.before else ""
            raise RefusedError(f"its structure consists of more than {self.most:,} values{together}")

    def to_mark(self) -> list[Value]:
        values, self.stack = self.stack, self.marks.pop()
        return values

    def joined(self, kind: str, values: list[Value]) -> Value:
        """A new value that consists of others."""
        return Value(kind, 1 + sum(value.count for value in values), self.around(values), items=values)

    def add(self, values: list[Value]) -> Value:
        """Make values a part of the one on top of the stack; return that.

        Raises RefusedError for one that was used before: what it is used in would consist of more than was counted.
        """
        top = self.stack[-1]
        if top.whole:
            raise RefusedError(f"its structure has a {top.kind} that grows after it was used")
        top.count += sum(value.count for value in values)
        top.depth = max(top.depth, self.around(values))
        return top

    def around(self, values: list[Value]) -> int:
        """Depth of a value that consists of others; raises RefusedError if it is too large."""
        depth = 1 + max((value.depth for value in values), default=-1)
        if depth > DEEPEST:
            raise RefusedError(f"its structure is nested more than {DEEPEST} deep")
        return depth

    def follow(self) -> None:
        """Follow the instructions up to the last."""
        while read := self.content.read(1):
            if read[0] == STOP:
                return
            self.used(1)
            self.step(read[0])
        raise EOFError("its structure has no end")

    def step(self, code: int) -> None:
        """Follow one instruction."""
        stack = self.stack
        if code in PUTS:
            place = self.number(PUTS[code])
            if place > len(self.memo) + FREE_KEYS:  # a key of a dictionary too; Python counts from 0
                raise RefusedError(f"its structure gives the number {place:,} to value {len(self.memo):,}")
            self.memo[place] = stack[-1]
        elif code in GETS:
            value = self.memo[self.number(GETS[code])]
            self.used(value.count)
            value.whole = True
            stack.append(value)
        elif code in EMPTY:
            grows = code in (pickle.EMPTY_LIST[0], pickle.EMPTY_DICT[0])
            stack.append(Value(EMPTY[code], items=[] if grows else ()))
        elif code in NUMBERS:
            stack.append(Value("number"))
            stack[-1].free = 0 <= self.number(NUMBERS[code]) < FREE_KEYS and code != pickle.BINFLOAT[0]
        elif code == LONG1:
            self.content.read(self.number("<B"))
            stack.append(Value("number"))
        elif code in TEXTS:
            text = self.content.read(self.number(TEXTS[code]))
            stack.append(Value("codec" if text in CODECS else "text", 1 + len(text) // TEXT_BYTES))
        elif code == GLOBAL:
            module, name = (self.content.readline()[:-1].decode() for _ in range(2))
            full = f"{module.replace('__builtin__', 'builtins')}.{name}"
            self.used(STAND_IN if full.startswith(STAND_INS) else 0)
            stack.append(Value("global", name=full))
        elif code == MARK:
            self.marks.append(stack)
            self.stack = []
        elif code == TUPLE:
            made = self.joined("tuple", self.to_mark())
            self.stack.append(made)
        elif code in TUPLES:
            stack[-TUPLES[code] :] = [self.joined("tuple", stack[-TUPLES[code] :])]
        elif code in (REDUCE, NEWOBJ):
            arguments = stack.pop()
            kind = self.called(stack[-1], arguments, code)
            stack[-1] = Value(kind, 1 + arguments.count, self.around([arguments]))
        elif code == BUILD:
            state = stack.pop()
            top = self.add([state])
            if top.kind != "stand-in" and (top.kind, state.kind) != ("ordered", "dict"):
                raise RefusedError(f"its structure gives a {top.kind} a state")
            self.used(STAND_IN if top.kind == "stand-in" else 0)
            self.hashed(state.items if top.kind == "ordered" else ())
        elif code in (pickle.APPEND[0], pickle.APPENDS[0]):
            values = [stack.pop()] if code == pickle.APPEND[0] else self.to_mark()
            top = self.add(values)
            if top.kind != "list" or not isinstance(top.items, list):
                raise pickle.UnpicklingError("a value is appended to what is no list")
            top.items += values
        elif code in (pickle.SETITEM[0], pickle.SETITEMS[0]):
            values = [stack.pop(), stack.pop()][::-1] if code == pickle.SETITEM[0] else self.to_mark()
            top = self.add(values)
            if top.kind == "dict" and isinstance(top.items, list):
                top.items += values[::2]
            self.hashed(values[::2])
        elif code == pickle.BINPERSID[0]:
            check_kinds("refers to a storage", SAVED, stack[-1])
            stack[-1] = Value("storage")
        elif code == pickle.PROTO[0]:
            if (protocol := self.number("<B")) > PROTOCOL:
                raise RefusedError(
                    f"it is written with pickle protocol {protocol}; expected at most {PROTOCOL}, as torch.load with "
                    "weights_only=True does"
                )
        else:
            raise pickle.UnpicklingError(f"instruction {code}")

    def hashed(self, keys: Sequence[Value]) -> None:
        """Count values that become keys of a dictionary or members of a set.

        Raises RefusedError for what are neither texts, numbers nor tuples of them, and for too many that are not free.
        """
        for key in keys:
            parts = key.items if key.kind == "tuple" else (key,)
            if other := [part.kind for part in parts if part.kind not in KEYS]:
                raise RefusedError(f"its structure has a {other[0]} as a key; expected a text or a number")
            self.keys += not key.free
        if self.keys > MOST_KEYS:
            raise RefusedError(
                f"its structure has more than {MOST_KEYS:,} keys that are neither texts nor integers from 0 to "
                f"{FREE_KEYS - 1:,}"
            )

    def called(self, function: Value, arguments: Value, code: int = REDUCE) -> str:
        """Kind of the result of a call; raises RefusedError, or UnpicklingError with a name, for what is refused."""
        name, given = function.name, arguments.items
        if name.startswith(STAND_INS):
            self.used(STAND_IN)
            return "stand-in"
        if name == QUANTIZED:
            raise RefusedError("it holds a quantized tensor; dequantize it and save it again")
        if name not in CALLS or code == NEWOBJ:
            raise pickle.UnpicklingError(f"GLOBAL {name or function.kind}")
        expected, kind = CALLS[name]
        what = f"calls {name} with"
        check_kinds(what, expected, arguments)
        if name in INNER:
            place, expected = INNER[name]
            check_kinds(what, expected, given[place])
        if kind in ("set", "counter", "ordered"):
            keys = [key for value in given for key in value.items]
            self.hashed([one for key in keys for one in (key.items[:1] or [key])] if kind == "ordered" else keys)
        elif name == FROM_TYPE and (made := self.called(given[0], given[2])) != "tensor":
            raise RefusedError(f"its structure gives a {made} a type and a state")
        return kind


def kind_of(value: Value) -> str:
    """Kind of an argument: of a tuple of numbers "numbers", of a list of them "row"."""
    if value.kind in ("tuple", "list") and all(item.kind == "number" for item in value.items):
        return "numbers" if value.kind == "tuple" else "row"
    return value.kind


def check_kinds(what: str, expected: str, arguments: Value) -> None:
    """Raise RefusedError unless arguments are a tuple whose kinds are those of an expression.

    Any other value would be taken apart by the call: a dictionary into its keys.
    """
    kinds = " ".join(map(kind_of, arguments.items)) if arguments.kind == "tuple" else f"*{arguments.kind}"
    if not re.fullmatch(expected, kinds):
        raise RefusedError(f"its structure {what} ({kinds[:80]}); expected ({expected})")
