"""The two modules of a comparison, and how the call of each takes the inputs.

An input given by a name that only one side's call has is passed to the other side's parameter in the same order, if
that is the only way. Evaluation flags of a Flax call (`deterministic`, `train`, …) and random keys that it requires
are filled in, as PyTorch's module runs in evaluation mode.
"""

import inspect
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from parity.checkpoint.opened import is_source, is_stored
from parity.compare.inputs import Inputs, Place
from parity.compare.sides.functions import Function

FLAGS = {
    "deterministic": True,
    "use_running_average": True,
    "inference": True,
    "disable_dropout": True,
    "eval_mode": True,
    "train": False,
    "training": False,
    "is_training": False,
    "is_train": False,
    "enable_dropout": False,
}
KEYS = ("rng", "key", "prng_key", "rng_key", "dropout_rng", "dropout_key")
POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
KINDS = "a flax.nnx.Module, a flax.linen.Module or parity.Function(apply, params)"
Parameters = Mapping[str, inspect.Parameter]


def modules(torch_module: Any, flax_module: Any, *, both: bool = False) -> tuple[Any, Any]:
    """The two modules of a comparison; raises ValueError that names a wrong one.

    Either may be None unless `both` are needed; these are the user's, and may be checkpoints, which `Comparison.of`
    replaces (`parity.checkpoint`). A module that `torch.compile` returned is replaced by the one that it
    compiled. A recording takes the place of a PyTorch module.
    """
    if both and torch_module is None:
        raise ValueError("torch_module=None must be a torch.nn.Module")
    if both and flax_module is None:
        raise ValueError(f"flax_module=None must be {KINDS}")
    if is_flax(torch_module) and (is_torch(flax_module) or is_source(flax_module)):
        raise ValueError(
            f"torch_module={described(torch_module)}, flax_module={described(flax_module)} must be in the other order"
        )
    known = torch_module is None or is_torch(torch_module) or is_recording(torch_module)
    if not known and not (both and is_source(torch_module)):
        raise ValueError(f"torch_module={described(torch_module)} must be a torch.nn.Module")
    if flax_module is not None and not is_flax(flax_module) and not (both and is_stored(flax_module)):
        inner = getattr(flax_module, "module", None)
        hint = "; pass its .module" if isinstance(inner, linen.Module) else ""
        raise ValueError(f"flax_module={described(flax_module)} must be {KINDS}{hint}")
    return initialized(getattr(torch_module, "_orig_mod", torch_module)), flax_module


def described(given: Any) -> str:
    """A wrong argument in a word: its type, or the name of a class or function."""
    if isinstance(given, type):
        return f"the class {given.__name__}"
    name = getattr(given, "__name__", None)
    return f"the function {name}" if callable(given) and isinstance(name, str) else type(given).__name__


def is_torch(module: Any) -> bool:
    """True for a `torch.nn.Module`; torch is not imported for it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(module, torch.nn.Module)


def is_flax(module: Any) -> bool:
    """True for everything that `adapters.as_module` takes."""
    return isinstance(module, nnx.Module | linen.Module | Function)


def is_recording(module: Any) -> bool:
    """True for an object that has a PyTorch module's tensors, but no call."""
    return not callable(module) and hasattr(module, "state_dict") and hasattr(module, "named_parameters")


def initialized(torch_module: Any) -> Any:
    """The same module; raises ValueError if one of its tensors has no values."""
    if not is_torch(torch_module):
        return torch_module
    is_lazy = sys.modules["torch"].nn.parameter.is_lazy
    for name, tensor in (*torch_module.named_parameters(), *torch_module.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"torch_module={type(torch_module).__name__}: {name} is not initialized; call it once before"
            )
        if tensor.is_meta:
            raise ValueError(f"torch_module={type(torch_module).__name__}: {name} is on device=meta and has no values")
    return torch_module


def fitted(inputs: Inputs, torch_module: Any, flax_module: Any) -> Inputs:
    """The inputs as both calls take them; raises ValueError if an input has no place in one of them."""
    theirs, ours = torch_parameters(torch_module), flax_parameters(flax_module)
    check_constants("torch_kwargs", inputs.torch_kwargs, theirs, "PyTorch")
    check_constants("flax_kwargs", inputs.flax_kwargs, ours, "Flax", ("rngs", "method", "mutable"))
    notes: list[str] = []
    places = {
        "torch": taken(inputs, theirs, ours, inputs.torch_kwargs, "PyTorch", notes),
        "flax": taken(inputs, ours, theirs, inputs.flax_kwargs, "Flax", notes),
    }
    own = {"torch": dict(inputs.torch_kwargs), "flax": dict(inputs.flax_kwargs)}
    for side, parameters, module in (("torch", theirs, torch_module), ("flax", ours, flax_module)):
        used = {places[side].get(name, name) for name in inputs.kwargs} | own[side].keys()
        positions = len([p for p in places[side].values() if isinstance(p, int)]) or len(inputs.args)
        used |= set(list(parameters or {})[:positions])
        added = {n: v for n, v in filled(parameters or {}, module).items() if n not in used}
        own[side] |= added
        if added:
            values = ", ".join(f"{n}={v if isinstance(v, bool) else type(v).__name__}" for n, v in added.items())
            notes.append(f"{'Flax' if side == 'flax' else 'PyTorch'} is called with {values}")
    return Inputs(inputs.args, inputs.kwargs, own["torch"], own["flax"], places, (*inputs.notes, *notes))


def check_constants(
    argument: str, values: Mapping[str, Any], parameters: Parameters | None, side: str, others: tuple[str, ...] = ()
) -> None:
    """Raises ValueError for a constant that a side's call does not take. others: names that any call takes."""
    if parameters is None or inspect.Parameter.VAR_KEYWORD in {parameter.kind for parameter in parameters.values()}:
        return
    unknown = [name for name in values if name not in passed(parameters) and name not in others]
    if unknown:
        takes = ", ".join(passed(parameters)) or "nothing"
        raise ValueError(
            f"{argument}: {', '.join(map(str, unknown))} is not taken by {side}'s call, which takes {takes}"
        )


def torch_parameters(module: Any) -> Parameters | None:
    """Parameters of a PyTorch module's call; None if they are not known."""
    forward = getattr(module, "forward", None)
    if forward is None:
        return None
    schema = getattr(forward, "schema", None)  # of a method that TorchScript compiled
    if schema is None:
        return signature_of(forward)
    kind, empty = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty
    return {
        a.name: inspect.Parameter(a.name, kind, default=a.default_value if a.has_default_value() else empty)
        for a in schema.arguments[1:]
    }


def flax_parameters(module: Any) -> Parameters | None:
    """Parameters of a Flax module's call; None if they are not known."""
    if module is None:
        return None
    if isinstance(module, Function):
        return signature_of(module.apply, 1)
    if isinstance(module, linen.Module):
        return signature_of(type(module).__call__, 1)
    return signature_of(module)


def signature_of(function: Any, skipped: int = 0) -> Parameters | None:
    """Parameters of a function after the first ones; None if it has no signature."""
    try:
        return dict(list(inspect.signature(function).parameters.items())[skipped:])
    except (TypeError, ValueError):
        return None


def taken(
    inputs: Inputs,
    parameters: Parameters | None,
    others: Parameters | None,
    constants: Mapping[str, Any],
    side: str,
    notes: list[str],
) -> dict[str, Place]:
    """`Inputs.places` of one side; an empty name for a constant that only the other side takes."""
    if parameters is None:
        return {}
    places: dict[str, Place] = {}
    kinds = {parameter.kind for parameter in parameters.values()}
    order = list(others or {})
    free = [
        n
        for n in passed(parameters)
        if n not in inputs.kwargs and n not in constants and n not in FLAGS and n not in KEYS
    ]
    positional = [name for name in free if parameters[name].kind in POSITIONAL]
    for i in range(len(inputs.args)):  # beyond the positional parameters: keywords, in order
        if i < len(positional):
            free.remove(positional[i])
        elif inspect.Parameter.VAR_POSITIONAL not in kinds:
            if not free:
                takes = ", ".join(passed(parameters)) or "nothing"
                raise ValueError(f"inputs: got {len(inputs.args)}; {side}'s call takes {takes}")
            places[f"input {i}"] = free.pop(0)
    missing = [name for name in inputs.kwargs if name not in passed(parameters)]
    for name in [n for n in missing if n in order and only_there(n, inputs.kwargs[n])]:
        places[name] = ""
        missing.remove(name)
    missing.sort(key=lambda name: order.index(name) if name in order else len(order))
    if not missing:
        return places
    if inspect.Parameter.VAR_POSITIONAL in kinds:  # such as Sequential's: names do not reach the first module
        known = [name for name in missing if name in order]
        if inputs.args or len(missing) < len(inputs.kwargs) or known != order[: len(known)]:
            return places
        return places | {name: i for i, name in enumerate(missing)}
    if inspect.Parameter.VAR_KEYWORD in kinds:
        return places
    pairs = paired(missing, free, parameters, order)
    if pairs is None:
        given = {"PyTorch": (parameters, others), "Flax": (others, parameters)}[side]
        theirs, ours = (", ".join(map(str, passed(group or {}))) or "nothing known" for group in given)
        raise ValueError(
            f"inputs: {', '.join(missing)} has no place in {side}'s call; PyTorch's takes {theirs}; "
            f"Flax's takes {ours} (constants for one side: torch_kwargs, flax_kwargs)"
        )
    notes.append(f"{side} takes {', '.join(f'{name} as {place}' for name, place in pairs.items())}")
    return places | pairs


def passed(parameters: Parameters) -> list[str]:
    """Parameters that are passed by name, or by position."""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, parameter in parameters.items() if parameter.kind not in variadic]


def only_there(name: str, value: Any) -> bool:
    """True if a side whose call lacks the name can do without it: None, and evaluation flags."""
    return value is None or (name in FLAGS and isinstance(value, bool))


def paired(missing: list[str], free: list[str], parameters: Parameters, order: list[str]) -> dict[str, str] | None:
    """The parameter for each name that a call does not have; None if that is ambiguous.

    First those that share a word, as `mask` and `attention_mask` do; then required ones by position; then in order, if
    as many parameters are left. order: the parameters of the other side's call.
    """
    found: dict[str, str] = {}
    for name in missing:
        near = [other for other in free if set(other.split("_")) & set(name.split("_"))]
        if len(near) == 1 and near[0] not in found.values():
            found[name] = near[0]
    position = dict(enumerate(parameters))
    for name in missing:
        place = position.get(order.index(name)) if name in order else None
        if name not in found and place in free and place not in found.values():
            found |= {name: place} if parameters[place].default is inspect.Parameter.empty else {}
    rest = [name for name in missing if name not in found]
    free = [name for name in free if name not in found.values()]
    required = [name for name in free if parameters[name].default is inspect.Parameter.empty]
    for group in (required, free):
        if len(group) == len(rest):
            return found | dict(zip(rest, group, strict=True))
    return None


def filled(parameters: Parameters, module: Any) -> dict[str, Any]:
    """Evaluation flags that a call requires, or whose default is training; random keys that it requires."""
    found: dict[str, Any] = {}
    for name, parameter in parameters.items():
        required = parameter.default is inspect.Parameter.empty and parameter.kind in (
            *POSITIONAL,
            inspect.Parameter.KEYWORD_ONLY,
        )
        if name in FLAGS:
            # A Linen module merges an argument None with its field of that name, and needs one of them.
            unset = (
                isinstance(module, linen.Module) and parameter.default is None and getattr(module, name, None) is None
            )
            if required or unset or parameter.default is (not FLAGS[name]):
                found[name] = FLAGS[name]
        elif required and is_flax(module):
            if name == "rngs":
                found[name] = nnx.Rngs(0)
            elif name in KEYS:
                found[name] = jax.random.key(0)
    return found


def checked_labels(labels: Any) -> np.ndarray | None:
    """Labels as an array of integers; raises ValueError for others."""
    if labels is None:
        return None
    array = np.asarray(labels)
    if array.dtype.kind not in "iu" or not array.size:
        raise ValueError(
            f"labels of dtype {array.dtype} and shape {list(array.shape)} must be a non-empty array of integers"
        )
    return array.astype(np.int64)
