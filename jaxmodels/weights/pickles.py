"""Work that a pickle asks for, counted before it is loaded.

PyTorch's unpickler runs no code of a file, but does everything else that the file says: a hundred bytes can ask for a
dictionary whose key is a tuple of tuples of tuples …, each the same twice, of which Python hashes 2⁶⁰, or for bytes of
any number. A tuple of a tuple of a tuple …, nested a million deep, overflows the stack when it is hashed. Here the
instructions are followed with numbers in place of values.
"""

import contextlib
import pickle
import struct
from typing import BinaryIO

# Values and instructions; a tensor takes about 35, so that this is 14,000 tensors. Each use of a value counts anew.
MOST = 500_000
DEEPEST = 100  # tuples, lists, dictionaries and arguments of calls in each other; a checkpoint has about ten
# Functions that PyTorch's unpickler is allowed to call, and that allocate and fill as much as their argument says.
FILLING = (b"bytearray", b"Counter")

MARK, STOP, GLOBAL, TUPLE = pickle.MARK[0], pickle.STOP[0], pickle.GLOBAL[0], pickle.TUPLE[0]
PUTS = {pickle.BINPUT[0]: "<B", pickle.LONG_BINPUT[0]: "<I"}
GETS = {pickle.BINGET[0]: "<B", pickle.LONG_BINGET[0]: "<I"}
INTEGERS = {pickle.BININT[0]: "<i", pickle.BININT1[0]: "<B", pickle.BININT2[0]: "<H"}
SIZED = {pickle.BINUNICODE[0]: "<I", pickle.SHORT_BINSTRING[0]: "<B", pickle.LONG1[0]: "<B"}  # format of the length
EMPTY = {pickle.NONE[0], pickle.NEWFALSE[0], pickle.NEWTRUE[0], pickle.EMPTY_TUPLE[0]}
CONTAINERS = {pickle.EMPTY_LIST[0], pickle.EMPTY_DICT[0], pickle.EMPTY_SET[0]}
TUPLES = {pickle.TUPLE1[0]: 1, pickle.TUPLE2[0]: 2, pickle.TUPLE3[0]: 3}
CALLS = {pickle.NEWOBJ[0], pickle.REDUCE[0]}
# Values that are added to the one below them.
ADDED = {pickle.BUILD[0]: 1, pickle.APPEND[0]: 1, pickle.SETITEM[0]: 2}
ADDED_TO_MARK = {pickle.APPENDS[0], pickle.SETITEMS[0]}


class TooMuchError(ValueError):
    """Error for a pickle that asks for more work than any checkpoint does."""


class Value:
    """Knowledge of a value: of how many it consists, how deeply nested, and the product of the integers in it.

    The product is at most MOST + 1: that of many large integers would take long.
    """

    __slots__ = ("count", "depth", "fills", "product")

    def __init__(self, count: int = 1, product: int = 1, fills: bool = False, depth: int = 0):
        self.count, self.product, self.fills, self.depth = count, min(product, MOST + 1), fills, depth


def check_work(content: BinaryIO, most: int = MOST, before: int = 0) -> int:
    """Number of values that loading the pickle at the position of a file would take, and those `before` it.

    Raises TooMuchError if they are more than `most`, or nested more than DEEPEST deep. Does not judge what is damaged
    or what PyTorch's unpickler refuses: it stops there, as that does.
    """
    count = Count(content, most, before)
    with contextlib.suppress(IndexError, KeyError, struct.error):
        count.follow()
    return count.total


class Count:
    """Follows a pickle's instructions as the unpickler does, with `Value` in place of values."""

    def __init__(self, content: BinaryIO, most: int, before: int = 0):
        self.content, self.most, self.total, self.before = content, most, before, before
        self.stack: list[Value] = []
        self.marks: list[list[Value]] = []
        self.memo: dict[int, Value] = {}

    def number(self, form: str) -> int:
        return int(struct.unpack(form, self.content.read(struct.calcsize(form)))[0])

    def used(self, count: int) -> None:
        """Add to the total; raises TooMuchError if it is too large."""
        self.total += count
        if self.total > self.most:
            together = ", with what was read before it" if self.before else ""
            raise TooMuchError(f"its structure consists of more than {self.most:,} values{together}")

    def to_mark(self) -> list[Value]:
        values, self.stack = self.stack, self.marks.pop()
        return values

    def joined(self, values: list[Value]) -> Value:
        """A new value that consists of others."""
        product = 1
        for value in values:
            product = min(product * value.product, MOST + 1)
        return Value(1 + sum(value.count for value in values), product, depth=self.around(values))

    def add(self, values: list[Value]) -> None:
        """Make values a part of the one on top of the stack."""
        top = self.stack[-1]
        top.count += sum(value.count for value in values)
        top.depth = max(top.depth, self.around(values))

    def around(self, values: list[Value]) -> int:
        """Depth of a value that consists of others; raises TooMuchError if it is too large."""
        depth = 1 + max((value.depth for value in values), default=-1)
        if depth > DEEPEST:
            raise TooMuchError(f"its structure is nested more than {DEEPEST} deep")
        return depth

    def follow(self) -> None:
        """Follow the instructions up to the last, or up to one that the unpickler refuses."""
        while (read := self.content.read(1)) and read[0] != STOP:
            self.used(1)
            if not self.step(read[0]):
                return

    def step(self, code: int) -> bool:
        """Follow one instruction; False if PyTorch's unpickler refuses it."""
        stack = self.stack
        if code in PUTS:
            self.memo[self.number(PUTS[code])] = stack[-1]
        elif code in GETS:
            value = self.memo[self.number(GETS[code])]
            self.used(value.count)
            stack.append(value)
        elif code in EMPTY or code in CONTAINERS:
            stack.append(Value())
        elif code in INTEGERS:
            stack.append(Value(product=max(self.number(INTEGERS[code]), 1)))
        elif code in SIZED:
            data = self.content.read(self.number(SIZED[code]))
            is_integer = code == pickle.LONG1[0]
            stack.append(Value(product=max(pickle.decode_long(data), 1) if is_integer else 1))
        elif code == pickle.BINFLOAT[0]:
            self.content.read(8)
            stack.append(Value())
        elif code == GLOBAL:
            self.content.readline()
            stack.append(Value(fills=self.content.readline().strip() in FILLING))
        elif code == MARK:
            self.marks.append(stack)
            self.stack = []
        elif code == TUPLE:
            value = self.joined(self.to_mark())
            self.stack.append(value)
        elif code in TUPLES:
            stack[-TUPLES[code] :] = [self.joined(stack[-TUPLES[code] :])]
        elif code in CALLS:
            arguments = stack.pop()
            if stack[-1].fills:
                self.used(arguments.product)
            stack[-1] = Value(1 + arguments.count, depth=self.around([arguments]))
        elif code in ADDED:
            values = [stack.pop() for _ in range(ADDED[code])]
            self.add(values)
        elif code in ADDED_TO_MARK:
            self.add(self.to_mark())
        elif code == pickle.BINPERSID[0]:
            stack[-1] = Value()
        elif code == pickle.PROTO[0]:
            self.content.read(1)
        else:
            return False
        return True
