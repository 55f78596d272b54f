"""`suggest`: propose the argument `names` of `parity.check` for a pair of modules."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.traverse_util import flatten_dict

from jaxmodels.weights.names import ConversionError
from parity.compare.adapters import as_module
from parity.compare.inputs import Inputs
from parity.compare.names import matches
from parity.compare.suggest.compression import compressed
from parity.compare.suggest.matching import Doubt, Item, Match, Matcher, starred
from parity.compare.suggest.tree import Node, flax_tree, submodules, torch_tree
from parity.compare.weights import Mapped


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A proposal for `names=`, with its ambiguities.

    ambiguous: by PyTorch's name, other Flax names that fit equally well; the order of definition decided. `*` stands
    for any number. unmatched_*: parts without a counterpart. problems: the error that `parity.check` would raise.
    """

    names: dict[str, Any]
    ambiguous: dict[str, list[str]]
    unmatched_torch: list[str]
    unmatched_flax: list[str]
    problems: str = ""

    @property
    def complete(self) -> bool:
        """True if `parity.check` accepts the names and carries every tensor, and nothing is ambiguous.

        A tensor that needs no counterpart (a buffer, a frozen parameter, a second name of a tied one) may have none.
        """
        return not self.problems and not self.ambiguous

    def __str__(self) -> str:
        lines = ["names = {", *(f"    {name!r}: {flax!r}," for name, flax in self.names.items()), "}"]
        lines += [f"ambiguous: {n} could also be {', '.join(others)}" for n, others in self.ambiguous.items()]
        lines += [f"no counterpart in Flax: {name}" for name in self.unmatched_torch]
        lines += [f"no counterpart in PyTorch: {name}" for name in self.unmatched_flax]
        return "\n".join([*lines, *([self.problems] if self.problems else [])])


@dataclasses.dataclass(frozen=True)
class Proposal:
    """Names, and what they were derived from."""

    names: dict[str, Any]
    match: Match
    problems: str


def suggest(
    torch_module: Any, flax_module: Any, inputs: Any = None, channels_last: Sequence[str] = (), *, verify: bool = False
) -> Suggestion:
    """Propose `names` for `parity.check`. A Linen module needs the `inputs` of the check for its shapes.

    verify: resolve ambiguities by running both modules on the inputs with each candidate.
    Raises ValueError for a Linen module without inputs, and for a module that is not a Flax module.
    """
    # Not a Comparison, which needs the names that are proposed here.
    order: dict[str, int] = {}
    given = None if inputs is None else Inputs.of(inputs)
    if isinstance(flax_module, linen.Module) and given is not None:
        order = call_order(flax_module, given, channels_last)
    flax_module = as_module(flax_module, given, channels_last)
    order = order or {path: i for i, (path, _) in enumerate(submodules(flax_module))}
    theirs, ours = torch_tree(torch_module), flax_tree(flax_module, order)
    found = proposal(torch_module, flax_module, theirs, ours, {})
    doubts = found.match.doubts
    ambiguous: dict[str, list[str]] = {}
    for doubt in doubts:
        for part, others in alternatives(doubt).items():
            known = ambiguous.setdefault(starred(part), [])
            known += [other for other in others if other not in known]
    left = [item for item in found.match.left if item.node.required]
    return Suggestion(
        found.names,
        ambiguous,
        unmatched(left, theirs),
        unmatched(found.match.free, ours),
        found.problems,
    )


def proposal(torch_module: Any, flax_module: Any, theirs: Node, ours: Node, forced: dict[str, Any]) -> Proposal:
    """Names with some pairs decided."""
    match = Matcher(theirs, ours, forced).run()
    carried = {pair.key for pair in match.pairs}
    dropped = [a.path for item in match.left for a in item.node.arrays if a.optional and a.path not in carried]
    names = compressed(match.pairs, match.containers, dropped)
    try:
        Mapped(torch_module, flax_module, names)
    except ConversionError as error:
        return Proposal(names, match, str(error))
    return Proposal(names, match, "")


def alternatives(doubt: Doubt) -> dict[str, list[str]]:
    """Flax's other names of each part in doubt."""
    found = {}
    for part, chosen in zip(doubt.parts, doubt.chosen, strict=True):
        others = [o for i, o in enumerate(doubt.options) if i != chosen]
        if isinstance(doubt.options[chosen], list):
            found[part] = ["another order of " + ", ".join(map(starred, doubt.options[chosen]))]
        else:
            found[part] = [starred(other) for other in others] or ["nothing: the names of the layers differ"]
    return found


def unmatched(items: list[Item], root: Node) -> list[str]:
    """Paths of what is left over, by layers whose arrays all are."""
    paths = {a.path for item in items for a in item.node.arrays}
    found: list[str] = []
    for node in root.walk():
        below = [a.path for a in node.arrays]
        if not node.container and paths.issuperset(below) and not any(is_inside(node.path, path) for path in found):
            found.append(node.path)
    return found


def is_inside(path: str, outer: str) -> bool:
    """True for a part and what is inside it."""
    return path == outer or path.startswith(f"{outer}.")


def call_order(module: linen.Module, inputs: Inputs, channels_last: Sequence[str]) -> dict[str, int]:
    """The place of each path of a Linen module's variables, in the order in which a call makes them."""
    order: dict[str, int] = {}

    def make() -> int:
        values = {n: jnp.moveaxis(v, 1, -1) if matches(n, channels_last) else v for n, v in inputs.named().items()}
        variables = inputs.call(functools.partial(module.init, jax.random.key(0)), values)
        for path in flatten_dict(variables):
            for i in range(2, len(path) + 1):
                order.setdefault(".".join(path[1:i]), len(order))
        return 0

    jax.eval_shape(make)
    return order
