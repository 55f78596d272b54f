"""Run a JAX function with nothing narrowed: its own jaxpr, evaluated with every float widened to float64.

A port may cast inside, by a `dtype` field, a softmax in float32, or a table. Its mathematics is judged without those
casts: `Widened` traces the function as it is, with float64 inputs, and evaluates the trace so that every cast, literal
and result type of a narrower float is float64 (complex128). What a port has rounded before tracing stays rounded, such
as a table made at construction: these arrays are `constants`, and `moved` shows how much their rounding matters.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core, source_info_util

from parity.compare.noise import ULPS, moved

WIDE = {dtype: np.dtype(np.float64) for dtype in ("float32", "float16", "bfloat16")} | {
    "complex64": np.dtype("complex128")
}
CALLS = {  # primitives that evaluate a jaxpr once, with the parameter that holds it
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
}
REBUILT = (
    "scatter",
    "reduce",
    "select_and_scatter",
    "custom_linear_solve",
)  # their jaxprs are retraced with wide types
SHORT = 6  # digits: a literal that needs no more was written as a decimal number, such as 0.1


def wide_dtype(dtype: Any) -> Any:
    """The dtype that replaces another; others than narrow floats are kept."""
    return WIDE.get(getattr(dtype, "name", str(dtype)), dtype)


def is_narrow(value: Any) -> bool:
    """True for an array, tracer or abstract value of a narrow float."""
    return getattr(getattr(value, "dtype", None), "name", "") in WIDE


def widened_array(value: Any) -> Any:
    """The array in float64 if it is a narrow float, else unchanged."""
    return jnp.asarray(value, wide_dtype(value.dtype)) if is_narrow(value) else value


@dataclasses.dataclass(frozen=True)
class Constant:
    """An array that a port has rounded to a narrow float before it is used: its name, dtype and values in float64."""

    name: str
    dtype: str
    value: np.ndarray

    def __str__(self) -> str:
        shape = f"[{', '.join(map(str, self.value.shape))}]" if self.value.ndim else f"{self.value:.9g}"
        return f"{self.name} ({self.dtype} {shape})"


class Trace:
    """The jaxpr of a function for arguments of given types, its narrow constants, and what is widened in it."""

    def __init__(self, function: Callable[..., Any], args: Sequence[Any]):
        trace = jax.make_jaxpr(function, return_shape=True)
        try:
            self.closed, self.shape = trace(*args)
        except TypeError:  # a state that is made in float32 meets float64, as the carry of Flax's recurrent cells
            with jax.enable_x64(False):
                self.closed, self.shape = trace(*jax.tree.map(as_without_x64, args))
        self.constants: list[Constant] = []
        self.numbers: dict[tuple[int, int], int] = {}  # (id of a jaxpr, position) or (id of a literal, -1) -> constant
        self.casts: collections.Counter[str] = collections.Counter()
        self.kept: collections.Counter[str] = collections.Counter()
        self.seen: set[int] = set()
        leaves = jax.tree.leaves_with_path(tuple(args))
        for i, (path, leaf) in enumerate(leaves):
            if is_narrow(leaf) and leaf.size:
                self.numbers[0, i] = self.constant(name_of(path), leaf)
        self.collect(self.closed.jaxpr, self.closed.consts)

    def constant(self, name: str, value: Any) -> int:
        """Add a constant; returns its number."""
        wide = np.asarray(value).astype(wide_dtype(value.dtype))
        self.constants.append(Constant(name, value.dtype.name, wide))
        return len(self.constants) - 1

    def collect(self, jaxpr: Any, consts: Sequence[Any]) -> None:
        """Find the constants and casts of a jaxpr and of those inside it."""
        if id(jaxpr) in self.seen:
            return
        self.seen.add(id(jaxpr))
        users = {id(v): e for e in reversed(jaxpr.eqns) for v in e.invars if not isinstance(v, core.Literal)}
        for i, (variable, value) in enumerate(zip(jaxpr.constvars, consts, strict=True)):
            if is_narrow(value) and np.size(value):
                user = users.get(id(variable))
                self.numbers[id(jaxpr), i] = self.constant(place(user) if user else "a constant", value)
        for equation in jaxpr.eqns:
            for value in equation.invars:
                if isinstance(value, core.Literal) and is_rounded(value):
                    aval: Any = value.aval
                    dtype = aval.dtype if is_narrow(aval) else np.float32
                    self.numbers[id(value), -1] = self.constant(place(equation), np.asarray(value.val, dtype))
            if narrows(equation):
                self.casts[f"{equation.outvars[0].aval.dtype.name} at {place(equation)}"] += 1
            for inner in jaxprs_of(equation):
                self.collect(*(inner.jaxpr, inner.consts) if hasattr(inner, "consts") else (inner, ()))


def name_of(path: Any) -> str:
    """The name of an argument's array: 'rope.table', or 'argument 2' for one that is an argument itself."""
    inside = jax.tree_util.keystr(path[1:], simple=True, separator=".")
    return inside.removesuffix(".value") or f"argument {path[0].idx}"


def as_without_x64(value: Any) -> Any:
    """The shape of an array in the dtype that it has without x64."""
    dtype = jnp.result_type(value)
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return value
    return jax.ShapeDtypeStruct(np.shape(value), jax.dtypes.canonicalize_dtype(dtype))


def integer_like(value: Any, aval: Any) -> Any:
    """An array of integers in the dtype of its trace; anything else unchanged."""
    return value.astype(aval.dtype) if jnp.issubdtype(aval.dtype, jnp.integer) else value


def place(equation: Any) -> str:
    """Origin of an equation in the user's code: 'file.py:12 (function)'."""
    frames = source_info_util.summarize(equation.source_info, num_frames=12).splitlines()
    own = [frame for frame in frames if "/flax/" not in frame and "/parity/" not in frame]
    where = (own or frames or ["unknown"])[-1]
    path, _, function = where.partition(" ")
    file, *line = path.rsplit("/", 1)[-1].split(":")
    return f"{':'.join([file, *line[:1]])} {function}".strip()


def shortest(value: Any, dtype: Any) -> str:
    """The shortest decimal number that rounds to a real value of a dtype: '0.1' for float32's 0.100000001."""
    texts = (f"{float(value):.{digits}g}" for digits in range(1, 10))
    return next((text for text in texts if np.asarray(float(text)).astype(dtype) == value), repr(float(value)))


def written(literal: Any) -> Any:
    """The number that a narrow literal was written as."""
    if literal.aval.dtype == np.complex64:
        value = np.complex64(literal.val)
        return complex(float(shortest(value.real, np.float32)), float(shortest(value.imag, np.float32)))
    return float(shortest(literal.val, literal.aval.dtype))


def is_rounded(literal: Any) -> bool:
    """True for a literal that holds a number rounded to a narrow float, and was not written as a short decimal."""
    dtype = literal.aval.dtype
    if not jnp.issubdtype(dtype, jnp.floating) or not np.isfinite(np.float64(literal.val)):
        return False
    if dtype == np.float64:  # `np.float32(1 / 7) * x`: no more bits than a float32 has, and nearly all of them
        value = np.float64(literal.val)
        mantissa = int(abs(np.frexp(value)[0]) * 2**24) if np.float32(value) == value else 0
        return mantissa != 0 and (mantissa & -mantissa) < 2**SHORT
    digits = shortest(literal.val, dtype).partition("e")[0].strip("-0.").replace(".", "")
    return len(digits) > SHORT and not float(literal.val).is_integer()


def narrows(equation: Any) -> bool:
    """True if an equation has a narrow float result of wide floats."""
    inputs = [getattr(v.aval, "dtype", None) for v in equation.invars]
    wide = any(dtype in (np.float64, np.complex128) for dtype in inputs)
    return wide and any(is_narrow(v.aval) for v in equation.outvars) and not jaxprs_of(equation)


def jaxprs_of(equation: Any) -> list[Any]:
    """The jaxprs among an equation's parameters."""
    found = []
    for value in equation.params.values():
        several = value if isinstance(value, tuple | list) else (value,)
        found += [one for one in several if hasattr(one, "eqns")]
    return found


class Evaluation:
    """One evaluation of a trace, with given values of its constants."""

    def __init__(self, trace: Trace, constants: Sequence[Any]):
        self.trace, self.constants = trace, constants

    def value(self, key: tuple[int, int], otherwise: Any) -> Any:
        """A constant's given value, or another value, widened."""
        number = self.trace.numbers.get(key)
        return widened_array(otherwise) if number is None else self.constants[number]

    def run(self, jaxpr: Any, consts: Sequence[Any], *args: Any) -> list[Any]:
        """The results of a jaxpr."""
        known: dict[Any, Any] = dict(zip(jaxpr.invars, map(widened_array, args), strict=True))
        for i, (variable, value) in enumerate(zip(jaxpr.constvars, consts, strict=True)):
            known[variable] = self.value((id(jaxpr), i), value)

        def read(v: Any) -> Any:
            if not isinstance(v, core.Literal):
                return known[v]
            if (id(v), -1) in self.trace.numbers:
                return self.value((id(v), -1), None)
            aval: Any = v.aval
            return jnp.asarray(written(v) if is_narrow(aval) else v.val, wide_dtype(aval.dtype))

        for equation in jaxpr.eqns:
            results = self.equation(equation, [read(v) for v in equation.invars])
            known |= zip(equation.outvars, map(widened_array, results), strict=True)
        return [read(v) for v in jaxpr.outvars]

    def closed(self, jaxpr: Any, *args: Any) -> list[Any]:
        """The results of a jaxpr that may have constants of its own."""
        return self.run(jaxpr.jaxpr, jaxpr.consts, *args) if hasattr(jaxpr, "consts") else self.run(jaxpr, (), *args)

    def equation(self, equation: Any, values: list[Any]) -> Sequence[Any]:
        """The results of one equation."""
        name, params = equation.primitive.name, equation.params
        if name in CALLS:
            return self.closed(params[CALLS[name]], *values)
        if name in ("scan", "while", "cond"):
            return getattr(self, f"{name}_")(params, values)
        if name == "reduce_precision":
            return values
        if name == "bitcast_convert_type":  # the bits of a narrow float are those of that float
            narrow = [v.astype(variable.aval.dtype) for v, variable in zip(values, equation.invars, strict=True)]
            return bound(equation, narrow, params)
        if name.startswith(REBUILT) or not jaxprs_of(equation):
            return bound(equation, values, {key: self.parameter(value) for key, value in params.items()})
        # A kernel or another primitive with code of its own runs as it is.
        self.trace.kept[f"{name} at {place(equation)}"] += 1
        narrow = [as_type(value, variable.aval) for value, variable in zip(values, equation.invars, strict=True)]
        return bound(equation, narrow, params)

    def parameter(self, value: Any) -> Any:
        """An equation's parameter with wide dtypes, inside its jaxprs too."""
        if isinstance(value, np.dtype):
            return wide_dtype(value)
        if isinstance(value, tuple) and any(hasattr(one, "eqns") for one in value):
            several = [self.parameter(one) for one in value]
            return type(value)(*several) if hasattr(value, "_fields") else type(value)(several)
        if not hasattr(value, "eqns"):
            return value
        variables = value.jaxpr.invars if hasattr(value, "consts") else value.invars
        types = [jax.ShapeDtypeStruct(v.aval.shape, wide_dtype(v.aval.dtype)) for v in variables]
        retraced = jax.make_jaxpr(lambda *args: self.closed(value, *args))(*types)
        return retraced if hasattr(value, "consts") else retraced.jaxpr

    def scan_(self, params: Any, values: list[Any]) -> Sequence[Any]:
        """`lax.scan`."""
        consts, carry, xs = operands_of_scan(params, values)
        n = len(carry)

        def body(carry: Any, x: Any) -> tuple[Any, Any]:
            out = self.closed(params["jaxpr"], *consts, *carry, *x)
            return tuple(out[:n]), tuple(out[n:])

        options = {key: params[key] for key in ("length", "reverse", "unroll")}
        last, ys = jax.lax.scan(body, tuple(carry), tuple(xs), **options)
        return [*last, *ys]

    def while_(self, params: Any, values: list[Any]) -> Sequence[Any]:
        """`lax.while_loop`."""
        n, m = params["cond_nconsts"], params["body_nconsts"]
        of_cond, of_body, carry = values[:n], values[n : n + m], values[n + m :]
        return jax.lax.while_loop(
            lambda carry: self.closed(params["cond_jaxpr"], *of_cond, *carry)[0],
            lambda carry: tuple(self.closed(params["body_jaxpr"], *of_body, *carry)),
            tuple(carry),
        )

    def cond_(self, params: Any, values: list[Any]) -> Sequence[Any]:
        """`lax.cond` and `lax.switch`."""
        branches = [lambda *args, b=branch: tuple(self.closed(b, *args)) for branch in params["branches"]]
        return jax.lax.switch(values[0], branches, *values[1:])


def operands_of_scan(params: Any, values: Sequence[Any]) -> tuple[list[Any], list[Any], list[Any]]:
    """Constants, carry and scanned arrays among the operands of a `scan` equation."""
    if "ft_in" in params:  # JAX 0.11 and newer: a tree of the operands
        consts, carry, xs = params["ft_in"].update(values).unpack()
        return list(consts), list(carry), list(xs)
    first, end = params["num_consts"], params["num_consts"] + params["num_carry"]
    return list(values[:first]), list(values[first:end]), list(values[end:])


def as_type(value: Any, aval: Any) -> Any:
    """The value in the dtype that an equation was traced with."""
    return value.astype(aval.dtype) if is_narrow(aval) else value


def bound(equation: Any, values: Sequence[Any], params: Any) -> Sequence[Any]:
    """The results of an equation's primitive for other values and parameters."""
    given = equation.primitive.get_bind_params(params)
    functions, params = given if isinstance(given, tuple) else ((), given)
    results = equation.primitive.bind(*functions, *values, **params)
    return results if equation.primitive.multiple_results else [results]


class Widened:
    """A function that runs with nothing narrowed; compiled by `compile` once for each structure of its arguments.

    Call it with x64 enabled and wide arguments. A narrow array among them is one of the `constants`.
    """

    def __init__(self, function: Callable[..., Any], compile: Callable[..., Any] = jax.jit):
        self.function, self.compile = function, compile
        self.known: dict[Any, tuple[Trace, Any]] = {}
        self.last: Trace | None = None

    def traced(self, args: Sequence[Any]) -> tuple[Trace, Any]:
        """The trace for arguments of these types, and its compiled evaluation."""
        leaves, structure = jax.tree.flatten(tuple(args))
        key = structure, tuple((np.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
        if key not in self.known:
            trace = Trace(self.function, args)
            inner = jax.tree.structure(trace.shape)

            def evaluate(constants: Sequence[Any], leaves: Sequence[Any]) -> Any:
                leaves = [integer_like(leaf, aval) for leaf, aval in zip(leaves, trace.closed.in_avals, strict=True)]
                own = [
                    leaf if (0, i) not in trace.numbers else constants[trace.numbers[0, i]]
                    for i, leaf in enumerate(leaves)
                ]
                out = Evaluation(trace, constants).run(trace.closed.jaxpr, trace.closed.consts, *own)
                return jax.tree.unflatten(inner, out)

            self.known[key] = trace, self.compile(evaluate)
        self.last = self.known[key][0]
        return self.known[key]

    def __call__(self, *args: Any) -> Any:
        trace, evaluate = self.traced(args)
        return evaluate([constant.value for constant in trace.constants], jax.tree.leaves(tuple(args)))

    def moved(self, rng: np.random.Generator, *args: Any, only: int | None = None) -> Any:
        """The results if the constants, or one of them, are moved by up to one rounding to their dtype."""
        trace, evaluate = self.traced(args)
        constants = [
            constant.value if only not in (None, i) else moved(constant.value, ULPS.get(constant.dtype, 2.0**-24), rng)
            for i, constant in enumerate(trace.constants)
        ]
        return evaluate(constants, jax.tree.leaves(tuple(args)))

    @property
    def constants(self) -> list[Constant]:
        """The narrow constants of the last call."""
        return self.last.constants if self.last else []

    @property
    def casts(self) -> dict[str, int]:
        """Casts that the last call widened: 'float32 at file.py:12 (function)', and how often."""
        return dict(self.last.casts) if self.last else {}

    @property
    def kept(self) -> list[str]:
        """Primitives of the last call that ran in their own dtype: kernels that cannot be widened."""
        return sorted(self.last.kept) if self.last else []
