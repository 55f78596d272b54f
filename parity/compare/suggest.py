"""`suggest`: propose names for a pair of models from shapes, names and order of definition.

Only parts whose arrays fit are paired. Of the possible assignments the one with the highest sum of scores is chosen; a
score adds the similarity of two names, the equality of their numbers, and the closeness of their places in the models.
"""

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from flax import nnx
from scipy.optimize import linear_sum_assignment

from jaxmodels.weights.names import ConversionError, Path, dotted, flat_arrays
from parity.compare.adapters import as_module
from parity.compare.inputs import Inputs
from parity.compare.names import starred
from parity.compare.weights import DROPPED, Mapped, aliases
from parity.compare.weights.owners import WORDS as FLAX_WORDS
from parity.compare.weights.roles import fits as array_fits

# Names that ports use for the same part.
WORDS = {
    "attention": "attn att self_attn selfattention mha",
    "embed": "emb embedding embeddings wte embed_tokens word_embeddings embed_in tok token src",
    "position": "pos wpe positions position_embeddings",
    "norm": "ln layernorm layer_norm norm rmsnorm input_layernorm",
    "query": "q q_proj wq q_lin",
    "key": "k k_proj wk k_lin",
    "value": "v v_proj wv v_lin",
    "output": "o out o_proj out_proj wo proj out_lin dense",
    "up": "fc fc1 fc_in up_proj lin1 linear1 layer1 dense_h_to_4h intermediate wi w1",
    "down": "fc2 fc_out down_proj lin2 linear2 layer2 dense_4h_to_h w2",
    "gate": "gate_proj w3 wi_0",
    "layer": "h layers blocks block l encoderblock stage stages",
    "mlp": "ffn ff ffw feed_forward feedforward ff_n",
    "head": "lm_head generator readout decoder classifier score embed_out logits",
    "final": "f ln_f last",
}
CANONICAL = {word: name for name, words in WORDS.items() for word in (name, *words.split())}
MARGIN = 0.1  # swaps that lower the score by less are ambiguous


@dataclasses.dataclass(frozen=True)
class Suggestion:
    """A proposal for `names=`, with its ambiguities.

    ambiguous: by PyTorch's name, other Flax names that fit equally well; the order of definition decided. unmatched_*:
    parts without a counterpart of fitting shapes. problems: the error that `parity.check` would raise.
    """

    names: dict[str, Any]
    ambiguous: dict[str, list[str]]
    unmatched_torch: list[str]
    unmatched_flax: list[str]
    problems: str = ""

    @property
    def complete(self) -> bool:
        """True if every array has a tensor; ambiguous ones may still be swapped."""
        return not self.problems

    def __str__(self) -> str:
        lines = ["names = {", *(f"    {name!r}: {flax!r}," for name, flax in self.names.items()), "}"]
        lines += [f"ambiguous: {n} could also be {', '.join(others)}" for n, others in self.ambiguous.items()]
        lines += [f"no counterpart in Flax: {name}" for name in self.unmatched_torch]
        lines += [f"no counterpart in PyTorch: {name}" for name in self.unmatched_flax]
        return "\n".join([*lines, *([self.problems] if self.problems else [])])


@dataclasses.dataclass(frozen=True)
class Owner:
    """A part with arrays of its own: its path, its place in the model's order (0 to 1), and shapes by name."""

    path: str
    place: float
    shapes: Mapping[str, tuple[int, ...]]
    module: Any = None


def suggest(torch_module: Any, flax_module: Any, inputs: Any = None, channels_last: Sequence[str] = ()) -> Suggestion:
    """Propose `names` for `parity.check`. A Linen module needs the `inputs` of the check for its shapes.

    Raises ValueError for a Linen module without inputs, and for a module that is not a Flax module.
    """
    # Not a Comparison, which needs the names that are proposed here.
    flax_module = as_module(flax_module, None if inputs is None else Inputs.of(inputs), channels_last)
    theirs, ours = torch_owners(torch_module), flax_owners(flax_module, layer_counts(torch_module))
    pairs, ambiguous = assigned(theirs, ours)
    found: dict[str, Any] = {a.path: b.path for a, b in pairs}
    left = [a for a in theirs if a.path not in found]
    free = [b for b in ours if b.path not in set(found.values())]
    for owner, parts in split(left, free):
        found[owner.path] = [part.path for part in parts]
        ambiguous[owner.path] = ["another order of " + ", ".join(found[owner.path])]
    for name, flax in loose(left, free, found):
        found[name] = flax
    found |= containers(torch_module, found)
    names = compressed(found, [path for path, _ in torch_module.named_modules()])
    used = {path for value in found.values() for path in ([value] if isinstance(value, str) else value)}
    try:
        Mapped(torch_module, flax_module, names)
        problems = ""
    except ConversionError as error:
        problems = str(error)
    return Suggestion(
        names,
        ambiguous,
        [a.path for a in left if not any(name.startswith(a.path) for name in found)],
        [b.path for b in free if not any(path.startswith(b.path) for path in used)],
        problems,
    )


def torch_owners(module: Any) -> list[Owner]:
    """PyTorch's parts in the order of definition; a tied parameter belongs to its first owner."""
    first = aliases(module)
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for key, tensor in module.state_dict().items():
        if first.get(key, key) == key and not key.endswith(DROPPED):
            owner, _, name = key.rpartition(".")
            groups.setdefault(owner, {})[name] = tuple(tensor.shape)
    n = max(1, len(groups) - 1)
    return [Owner(p, i / n, s, module.get_submodule(p)) for i, (p, s) in enumerate(groups.items())]


def flax_owners(module: nnx.Module, counts: set[int]) -> list[Owner]:
    """Flax's parts in the order of definition; a stack as long as a PyTorch list counts once per layer."""
    groups: dict[str, dict[str, tuple[int, ...]]] = {}
    for path, array in flat_arrays(module).items():
        groups.setdefault(dotted(path[:-1]), {})[str(path[-1])] = tuple(array.shape)
    order = definition_order(module)
    groups = dict(sorted(groups.items(), key=lambda item: (order.get(item[0], len(order)), natural(item[0]))))
    owners: list[Owner] = []
    n = max(1, len(groups) - 1)
    for i, (owner, shapes) in enumerate(groups.items()):
        leading = {shape[0] if shape else 0 for shape in shapes.values()}
        words = owner.split(".")
        stacked = len(leading) == 1 and leading <= counts and len(words) > 1 and not any(w.isdigit() for w in words)
        if stacked and all(len(shape) > 1 for shape in shapes.values()):
            inner = {name: shape[1:] for name, shape in shapes.items()}
            owners += [Owner(".".join([words[0], str(k), *words[1:]]), i / n, inner) for k in range(min(leading))]
        else:
            owners.append(Owner(owner, i / n, shapes))
    return owners


def layer_counts(module: Any) -> set[int]:
    """Lengths of PyTorch's lists of modules."""
    return {len(m) for m in module.modules() if type(m).__name__ in ("ModuleList", "Sequential")} - {0, 1}


def definition_order(module: nnx.Module) -> dict[str, int]:
    """The place of each sub-module's path in the order in which attributes were set."""
    order: dict[str, int] = {}

    def walk(path: tuple[str, ...], node: Any) -> None:
        order.setdefault(".".join(path), len(order))
        children = node.items() if isinstance(node, dict) else enumerate(node) if is_list(node) else vars(node).items()
        for name, child in children:
            if isinstance(child, nnx.Module | dict) or is_list(child):
                walk((*path, str(name)), child)

    walk((), module)
    return order


def is_list(node: Any) -> bool:
    """True for a list of modules."""
    return isinstance(node, list | tuple | nnx.List)


def natural(path: str) -> list[Any]:
    """A key that sorts numbers in a path by value."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def fits(owner: Owner, other: Owner) -> bool:
    """True if each array of one is an array of the other, by name and shape."""
    return len(owner.shapes) == len(other.shapes) and all(
        any(shape_fits(owner, name, other, flax) for flax in flax_names(name, other)) for name in owner.shapes
    )


def flax_names(name: str, other: Owner) -> Iterator[str]:
    """Flax's possible names of a tensor that the other part has."""
    return (flax for flax in (name, *FLAX_WORDS.get(name, ())) if flax in other.shapes)


def shape_fits(owner: Owner, name: str, other: Owner, flax: str, parts: int = 1) -> bool:
    """True if a tensor, or one of equal parts of it, has the shape of Flax's array."""
    return array_fits(owner.module, name, owner.shapes[name], flax, other.shapes[flax], parts)


def assigned(theirs: list[Owner], ours: list[Owner]) -> tuple[list[tuple[Owner, Owner]], dict[str, list[str]]]:
    """The best pairs, and by PyTorch's path the Flax paths that fit almost as well."""
    impossible = -1e6
    scores = np.array([[score(a, b) if fits(a, b) else impossible for b in ours] for a in theirs], dtype=float)
    if not scores.size:
        return [], {}
    rows, columns = linear_sum_assignment(scores, maximize=True)
    chosen = [(i, j) for i, j in zip(rows, columns, strict=True) if scores[i, j] > impossible]
    ambiguous: dict[str, list[str]] = {}
    taken = {j: i for i, j in chosen}
    for i, j in chosen:
        for k in range(len(ours)):
            if k == j or scores[i, k] == impossible:
                continue
            gain = scores[i, k] - scores[i, j]
            if k in taken:
                gain += scores[taken[k], j] - scores[taken[k], k]
            if gain > -MARGIN:
                ambiguous.setdefault(theirs[i].path, []).append(ours[k].path)
    return [(theirs[i], ours[j]) for i, j in chosen], ambiguous


def score(owner: Owner, other: Owner) -> float:
    """The score of a pair: names up to 2, numbers up to 1, order up to 1."""
    a, b = tokens(owner.path), tokens(other.path)
    words = [[t for t in ts if not t.isdigit()] for ts in (a, b)]
    numbers = [[t for t in ts if t.isdigit()] for ts in (a, b)]
    last = difflib.SequenceMatcher(None, words[0][-1] if words[0] else "", words[1][-1] if words[1] else "").ratio()
    shared = len(set(words[0]) & set(words[1])) / max(1, len(set(words[0]) | set(words[1])))
    return last + shared + float(numbers[0] == numbers[1]) + 1.0 - 2 * abs(owner.place - other.place)


def tokens(path: str) -> list[str]:
    """The words and numbers of a path in one vocabulary: 'h.3.ln_1' -> layer 3 norm 1."""
    found: list[str] = []
    for word in path.split("."):
        lower = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", word).lower()
        if lower in CANONICAL:
            found.append(CANONICAL[lower])
            continue
        parts = re.findall(r"[a-z]+|\d+", lower)
        found += [CANONICAL.get(part, part) for part in parts]
    return found


def split(left: list[Owner], free: list[Owner]) -> Iterator[tuple[Owner, list[Owner]]]:
    """PyTorch parts that hold several Flax parts (a fused query, key and value); removes them from both lists."""
    for owner in list(left):
        for first in list(free):
            parent = first.path.rpartition(".")[0]
            group = [b for b in free if b.path.rpartition(".")[0] == parent and b.shapes == first.shapes]
            together = len(group) in (2, 3) and len(owner.shapes) == len(first.shapes)
            numbers = [[t for t in tokens(path) if t.isdigit()] for path in (owner.path, parent)]
            if not together or numbers[0] != numbers[1]:
                continue
            if all(
                any(shape_fits(owner, n, first, flax, len(group)) for flax in flax_names(n, first))
                for n in owner.shapes
            ):
                group.sort(key=lambda b: ("query key value".find(tokens(b.path)[-1]), b.place))
                left.remove(owner)
                for part in group:
                    free.remove(part)
                yield owner, group
                break


def loose(left: list[Owner], free: list[Owner], found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Parameters of parts that did not fit as a whole, each with the most similar array of its shape."""
    arrays = {f"{b.path}.{n}".lstrip("."): s for b in free for n, s in b.shapes.items()}
    for owner in left:
        if "weight" in owner.shapes:  # a layer, which has a counterpart as a whole or none
            continue
        for name, shape in owner.shapes.items():
            full = f"{owner.path}.{name}".lstrip(".")
            options = [n for n, s in arrays.items() if s == shape]
            if options:
                best = max(options, key=lambda n: difflib.SequenceMatcher(None, tokens(full), tokens(n)).ratio())
                arrays.pop(best)
                yield full, best


def containers(module: Any, found: Mapping[str, Any]) -> dict[str, str]:
    """Names of containers, inferred from the names of their parts; each Flax part once, outermost first."""
    names: dict[str, str] = {}
    for path, _ in module.named_modules():
        below = [v for n, v in found.items() if n.startswith(f"{path}.") and path]
        flat = [p.split(".") for v in below for p in ([v] if isinstance(v, str) else v)]
        if path in found or not flat:
            continue
        common = []
        for words in zip(*(f[:-1] for f in flat), strict=False):
            if len(set(words)) > 1:
                break
            common.append(words[0])
        flax = ".".join(common)
        if flax and flax not in names.values():
            names[path] = flax
    return names


def compressed(found: Mapping[str, Any], paths: list[str]) -> dict[str, Any]:
    """The same names with fewer entries: numbers become `*`; names implied by an enclosing part are left out."""
    names: dict[str, Any] = {}
    for name in sorted(found, key=lambda n: (n.count("."), paths.index(n) if n in paths else len(paths))):
        flax = found[name] if isinstance(found[name], list) else [found[name]]
        if starred(names)(name) == flax:
            continue
        patterns = [re.sub(r"(?<![^.])\d+(?![^.])", "*", text) for text in (name, *flax)]
        trial = {patterns[0]: patterns[1] if len(flax) == 1 else patterns[1:]}
        alike = [n for n in found if re.sub(r"(?<![^.])\d+(?![^.])", "*", n) == patterns[0]]
        good = all(p.count("*") == patterns[0].count("*") for p in patterns[1:]) and all(
            starred(trial)(n) == (found[n] if isinstance(found[n], list) else [found[n]]) for n in alike
        )
        names |= trial if good else {name: found[name]}
    return names


__all__ = ["Path", "Suggestion", "suggest"]
