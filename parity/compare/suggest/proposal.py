"""`suggest`: propose the argument `names` of `parity.check` for a pair of modules."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen
from flax.traverse_util import flatten_dict

from jaxmodels.weights.names import ConversionError
from parity.compare.arguments import fitted, modules
from parity.compare.comparison import Comparison
from parity.compare.inputs import Inputs
from parity.compare.names import matches
from parity.compare.sides.adapters import as_module
from parity.compare.suggest.compression import compressed
from parity.compare.suggest.matching import Doubt, Item, Match, Matcher, starred
from parity.compare.suggest.tree import Node, flax_tree, submodules, torch_tree
from parity.compare.suggest.verification import Candidate, Runs, options, resolved
from parity.compare.weights import Mapped, Twins

UNDECIDED = (
    "verify=True did not decide: no candidate agrees with PyTorch and all others differ. If the port has a bug, find "
    "it first: parity.check with these names, or with one of the others"
)


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A proposal for `names=`, with its ambiguities.

    ambiguous: by PyTorch's name, other Flax names that fit equally well; the order of definition decided. `*` stands
    for any number. unmatched_*: parts without a counterpart. problems: the error that `parity.check` would raise.
    layouts: for `layouts=`, of tensors that fit in several ways, if a run has told which. note: why runs did not.
    """

    names: dict[str, Any]
    ambiguous: dict[str, list[str]]
    unmatched_torch: list[str]
    unmatched_flax: list[str]
    problems: str = ""
    layouts: dict[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""

    @property
    def complete(self) -> bool:
        """True if `parity.check` accepts the names and carries every tensor, and nothing is ambiguous.

        A tensor that needs no counterpart (a buffer, a frozen parameter, a second name of a tied one) may have none.
        """
        return not self.problems and not self.ambiguous

    def __str__(self) -> str:
        lines = ["names = {", *(f"    {name!r}: {flax!r}," for name, flax in self.names.items()), "}"]
        if self.layouts:
            lines += ["layouts = {", *(f"    {name!r}: {layout!r}," for name, layout in self.layouts.items()), "}"]
        lines += [f"ambiguous: {n} could also be {', '.join(others)}" for n, others in self.ambiguous.items()]
        lines += [self.note] if self.note else []
        lines += [f"no counterpart in Flax: {name}" for name in self.unmatched_torch]
        lines += [f"no counterpart in PyTorch: {name}" for name in self.unmatched_flax]
        return "\n".join([*lines, *([self.problems] if self.problems else [])])


class Search:
    """Both modules, their trees, and the settings of the weights, from which `suggest` derives names."""

    def __init__(self, torch_module: Any, flax_module: Any, order: Mapping[str, int], settings: Mapping[str, Any]):
        self.torch, self.flax, self.settings = torch_module, flax_module, settings
        self.theirs = without(torch_tree(torch_module), settings["torch_only"])
        self.ours = without(flax_tree(flax_module, order), settings["flax_only"])

    def match(self, forced: Mapping[str, Any]) -> Match:
        """The match of the trees with some pairs decided."""
        return Matcher(self.theirs, self.ours, forced).run()

    def names(self, forced: Mapping[str, Any]) -> dict[str, Any]:
        """Names from a match."""
        return self.names_of(self.match(forced))

    def names_of(self, match: Match) -> dict[str, Any]:
        """Names from a match; what needs no counterpart and has none is None."""
        carried = {pair.key for pair in match.pairs}
        dropped = [a.path for item in match.left for a in item.node.arrays if a.optional and a.path not in carried]
        return compressed(match.pairs, match.containers, dropped, [node.path for node in self.theirs.walk()])

    def weights(self, candidate: Candidate) -> Mapped:
        """The conversion under names; raises ConversionError if it does not fit."""
        return Mapped(self.torch, self.flax, candidate.names, chosen=candidate.chosen, **self.settings)


def suggest(
    torch_module: Any,
    flax_module: Any,
    inputs: Any = None,
    channels_last: Sequence[str] = (),
    *,
    verify: bool = False,
    layouts: Mapping[str, str] | None = None,
    torch_only: Sequence[str] = (),
    flax_only: Sequence[str] = (),
    torch_kwargs: Mapping[str, Any] | None = None,
    flax_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Suggestion:
    """Propose `names` for `parity.check`, which documents the other arguments.

    Equal names count most, then similar ones, then the structure around a part. Parts are paired only if their arrays
    fit; what the names do not decide is taken in the order of definition and listed as ambiguous. A Linen module needs
    the `inputs` of the check for its shapes.

    verify: resolve ambiguities by running both modules on the inputs, at most about a hundred times: the candidate that
        agrees with PyTorch is taken if its difference is a thousand times smaller than any other's
    Raises ValueError for a Linen module or verify=True without inputs, and for arguments of another kind.
    """
    # Not a Comparison, which needs the names that are proposed here.
    modules(torch_module, flax_module, both=True)
    torch_module, linen_or_nnx = modules(torch_module, flax_module)
    if inputs is None and verify:
        raise ValueError("inputs=None: verify=True needs inputs to run the modules")
    given = None
    if inputs is not None:
        given = fitted(Inputs.of(inputs, torch_kwargs, flax_kwargs), torch_module, linen_or_nnx)
    flax_module = as_module(linen_or_nnx, given, channels_last)
    order: dict[str, int] = {path: i for i, (path, _) in enumerate(submodules(flax_module))}
    if isinstance(linen_or_nnx, linen.Module) and given is not None:
        order = call_order(linen_or_nnx, given, channels_last)
    settings = {"layouts": layouts, "torch_only": torch_only, "flax_only": flax_only}
    search = Search(torch_module, flax_module, order, settings)
    equal = Candidate({}, {}, {})
    try:
        doubtful = list(search.weights(equal).choices)
    except ConversionError:
        match = search.match({})
        names, doubts = search.names_of(match), match.doubts
    else:
        match, names, doubts = Match(), {}, []
        if not doubtful:
            return Suggestion({}, {}, [], [])
    best = Candidate({}, names, {})
    resolved_all = False
    if verify and given is not None and (doubts or fits_several(search, best)):
        decided = verified(search, given, channels_last, doubts, names, seed)
        if decided is not None:
            best, resolved_all = decided, True
            match = search.match(best.forced) if doubts else match
    found = suggestion(search, best, match, resolved_all)
    return dataclasses.replace(found, note=UNDECIDED) if verify and found.ambiguous else found


def suggestion(search: Search, best: Candidate, match: Match, resolved_all: bool) -> Suggestion:
    """The result: names, what is ambiguous, and what is left over."""
    ambiguous: dict[str, list[str]] = {}
    layouts: dict[str, str] = {}
    for part, others in (
        [] if resolved_all else [item for doubt in match.doubts for item in alternatives(doubt).items()]
    ):
        ambiguous.setdefault(starred(part), others)  # of equal layers the first
    problems = ""
    try:
        weights = search.weights(best)
    except ConversionError as error:
        problems = str(error)
    else:
        for choice in weights.choices.values():
            key = choice.name.partition(" -> ")[0]
            if resolved_all:
                layouts[key] = choice.options[choice.chosen]
            else:
                ambiguous[key] = [f"the layout '{o}'" for o in choice.options if o != choice.options[choice.chosen]]
    left = [item for item in match.left if item.node.required]
    return Suggestion(
        best.names,
        ambiguous,
        unmatched(left, search.theirs),
        unmatched(match.free, search.ours),
        problems,
        layouts,
    )


def fits_several(search: Search, candidate: Candidate) -> bool:
    """True if the layout of a tensor is open."""
    try:
        return bool(search.weights(candidate).choices)
    except ConversionError:
        return False


def verified(
    search: Search, inputs: Inputs, channels_last: Sequence[str], doubts: Sequence[Doubt], names: Any, seed: int
) -> Candidate | None:
    """The candidate whose outputs agree with PyTorch's; None if none stands out."""
    from parity.compare.randomize import randomized

    comparison = Comparison(
        torch=randomized(search.torch, seed),
        flax=search.flax,
        weights=Twins(),
        inputs=inputs,
        labels=None,
        channels_last=tuple(channels_last),
        zero_gradients=(),
        device=jax.devices()[0],
        float64=True,
        seed=seed,
    )
    propose = search.names if doubts else lambda forced: names
    return resolved(Runs(comparison, search.weights), propose, options(doubts))


def without(node: Node, patterns: Sequence[str]) -> Node:
    """The tree without the arrays that match a pattern."""
    children = tuple(without(c, patterns) for c in node.children if c.shape is None or not matches(c.path, patterns))
    return dataclasses.replace(node, children=tuple(c for c in children if c.arrays))


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
    unbound = module if module.scope is None else module.unbind()[0]

    def make() -> int:
        named = inputs.named().items()
        values = {n: jnp.moveaxis(jnp.asarray(v), 1, -1) if matches(n, channels_last) else v for n, v in named}
        variables = inputs.call(lambda *a, rngs=None, **k: unbound.init(jax.random.key(0), *a, **k), values, "flax")
        for path in flatten_dict(variables):
            for i in range(2, len(path) + 1):
                order.setdefault(".".join(path[1:i]), len(order))
        return 0

    jax.eval_shape(make)
    return order
