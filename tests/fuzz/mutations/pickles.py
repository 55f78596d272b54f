"""Changes of pickles by opcode: arguments, globals, order."""

import pickletools
import struct

from tests.fuzz.mutations.values import INTEGERS, STRINGS, Rng, choose

GLOBALS = (
    *("os system", "builtins eval", "builtins exec", "builtins getattr", "posix system", "subprocess Popen"),
    *("collections OrderedDict", "collections Counter", "collections defaultdict", "__builtin__ set"),
    *("torch._utils _rebuild_tensor_v2", "torch._utils _rebuild_tensor", "torch._utils _rebuild_parameter"),
    *("torch._utils _rebuild_sparse_tensor", "torch._utils _rebuild_qtensor", "torch._utils _rebuild_nested_tensor"),
    *("torch._utils _rebuild_meta_tensor_no_storage", "torch._utils _rebuild_wrapper_subclass", "torch._tensor Tensor"),
    *("torch._tensor _rebuild_from_type_v2", "torch._utils _rebuild_device_tensor_from_numpy", "torch Size"),
    *("torch.storage _load_from_bytes", "torch.storage UntypedStorage", "torch FloatStorage", "torch DoubleStorage"),
    *("torch QInt8Storage", "torch BFloat16Storage", "torch ComplexFloatStorage", "torch device", "torch float64"),
    *("numpy.core.multiarray _reconstruct", "numpy.core.multiarray scalar", "numpy ndarray", "numpy dtype"),
    *(
        "_codecs encode",
        "__builtin__ bytearray",
        "torch.storage TypedStorage",
        "_io BytesIO",
        "torch.nn.parameter Parameter",
        "torch.jit._pickle build_intlist",
    ),
)
SIMPLE = (b"N", b"\x88", b"\x89", b")", b"]", b"}", b"K\x07", b"G\x7f\xf8\x00\x00\x00\x00\x00\x00", b"(", b"0", b"2")


def mutated_pickle(content: bytes, rng: Rng) -> bytes:
    """Content that begins with pickles, of which one opcode is changed, removed, repeated or moved.

    Raises ValueError if there is no pickle at the beginning.
    """
    pieces, rest = opcodes(content)
    i = int(rng.integers(1, max(2, len(pieces) - 1)))
    change = int(rng.integers(8))
    if change == 0:
        del pieces[i]
    elif change == 1:
        pieces[i:i] = [pieces[i]] * int(rng.integers(1, 50))
    elif change == 2:
        j = int(rng.integers(len(pieces)))
        pieces[i], pieces[j] = pieces[j], pieces[i]
    elif change == 3:
        pieces.insert(i, choose(rng, SIMPLE))
    elif change == 4:
        pieces.insert(i + 1, called(rng))
    else:
        pieces[i] = changed(pieces[choose_kind(pieces, rng)] if rng.random() < 0.2 else pieces[i], rng)
    return b"".join(pieces) + rest


def opcodes(content: bytes) -> tuple[list[bytes], bytes]:
    """Opcodes of all pickles that follow each other at the beginning of a content, and the rest."""
    pieces: list[bytes] = []
    end = 0
    while content[end : end + 1] == b"\x80":
        try:
            found = list(pickletools.genops(content[end:]))
        except ValueError:
            break
        starts = [position or 0 for _, _, position in found]
        length = starts[-1] + 1  # STOP has one byte
        bounds = zip(starts, [*starts[1:], length], strict=True)
        pieces += [content[end + first : end + last] for first, last in bounds]
        end += length
    if not pieces:
        raise ValueError("no pickle")
    return pieces, content[end:]


def choose_kind(pieces: list[bytes], rng: Rng) -> int:
    """Index of an opcode of a random kind, so that rare kinds are chosen as often as frequent ones."""
    kind = choose(rng, sorted({piece[:1] for piece in pieces}))
    return choose(rng, [i for i, piece in enumerate(pieces) if piece[:1] == kind])


def changed(piece: bytes, rng: Rng) -> bytes:
    """Opcode with another argument, or a simple opcode in the place of one without."""
    code = piece[:1]
    if code in b"JKMI\x8a":
        return integer(choose(rng, INTEGERS))
    if code in b"XU\x8c":
        text = choose(rng, STRINGS).encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    if code == b"c":
        module, _, name = choose(rng, GLOBALS).partition(" ")
        return f"c{module}\n{name}\n".encode()
    if code in b"qrhj" and len(piece) > 1:
        return code + bytes([*piece[1:-1], int(rng.integers(256))])
    return choose(rng, SIMPLE)


def called(rng: Rng) -> bytes:
    """Opcodes that put the result of a call in the place of a value: of it, numbers, texts, and of the result again."""
    given = b"".join(changed(choose(rng, (b"K", b"X", b"c")), rng) for _ in range(int(rng.integers(4))))
    module, _, name = choose(rng, GLOBALS).partition(" ")
    function = f"c{module}\n{name}\n".encode()
    arguments = choose(rng, (b"\x85", b"(" + given + b"t", b")"))
    return function + arguments + choose(rng, (b"R", b"R", b"\x81", b"R" + b"}X\x05\x00\x00\x00itemsK\x05sb"))


def integer(value: int) -> bytes:
    """Opcode LONG1 of an integer."""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data
