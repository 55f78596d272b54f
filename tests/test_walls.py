"""Who may import whom: read from the source, so that imports inside functions and those for types count too."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWN = {"jaxmodels", "torch_ref", "parity", "train", "bench", "tests", "examples"}
CORE = {"jax", "flax", "numpy", "ml_dtypes"}  # ml_dtypes: numpy's bfloat16, which jax itself needs
TRAINING = {"filelock", "grain", "matplotlib", "optax", "orbax", "rich", "tensorboardX", "tyro"}  # extra `train`
TORCH_FILES = ("jaxmodels.io", "jaxmodels.weights", "jaxmodels.convert")  # read and write .pt files
# Entry points: they may import anything, and nothing imports them.
PROGRAMS = {
    "jaxmodels.command",
    "jaxmodels.convert.command",
    "jaxmodels.generate.command",
    "jaxmodels.neox.generate",
    "jaxmodels.retro.neighbors",
    "jaxmodels.retro.retrieval.command",
    "jaxmodels.training.commands.sample",
    "jaxmodels.scoring.lm_eval",
    "parity.command",
    "parity.mutations",
    "train.sample",
}


def statements(source: str, module: str = "", *, package: bool = False) -> list[tuple[str, str, bool]]:
    """(module, name or '', whether it runs only later) of each import of a module of that name."""
    found = []

    def visit(node: ast.AST, later: bool) -> None:
        match node:
            case ast.Import():
                found.extend((alias.name, "", later) for alias in node.names)
            case ast.ImportFrom():
                base = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
                source_module = ".".join([*base, *([node.module] if node.module else [])])
                found.extend((source_module, alias.name, later) for alias in node.names)
            case ast.If(test=ast.Name("TYPE_CHECKING")) | ast.FunctionDef() | ast.AsyncFunctionDef() | ast.Lambda():
                later = True
        for child in ast.iter_child_nodes(node):
            visit(child, later)

    visit(ast.parse(source), False)
    return found


def imports(source: str) -> tuple[set[str], set[str]]:
    """Top-level packages imported when a module is imported, and those imported later, without the standard library."""
    found = statements(source)
    at_once, later = ({name.split(".")[0] for name, _, late in found if late is when} for when in (False, True))
    return at_once - sys.stdlib_module_names, later - sys.stdlib_module_names


def modules(package: str) -> dict[str, Path]:
    """Files of a package by module name."""
    files = sorted((ROOT / package).rglob("*.py"))
    names = (".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files)
    return dict(zip(names, files, strict=True))


ALL = {
    name: file
    for package in ("jaxmodels", "torch_ref", "parity", "train", "bench")
    for name, file in modules(package).items()
}


@functools.cache
def graph() -> dict[str, set[str]]:
    """The modules that each module imports, at any time."""
    edges: dict[str, set[str]] = {}
    for name, file in ALL.items():
        found = statements(file.read_text(), name, package=file.name == "__init__.py")
        targets = {f"{module}.{what}" if f"{module}.{what}" in ALL else module for module, what, _ in found}
        edges[name] = (targets & ALL.keys()) - {name}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of nodes that reach each other (Tarjan's strongly connected components of more than one)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for other in edges[node]:
            if other not in index:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == index[node]:
            group = stack[stack.index(node) :]
            del stack[-len(group) :]
            if len(group) > 1:
                found.append(sorted(group))

    for node in edges:
        if node not in index:
            visit(node)
    return sorted(found)


def each_module(*packages: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [name for package in packages for name in modules(package)])


def inside(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\nfrom c import d\nimport os\nif True:\n  import e\ndef f():\n  import g\n"
    source += "if TYPE_CHECKING:\n  import h\nclass I:\n  import i\n  def j(self):\n    if self: from k.l import m\n"
    assert imports(source) == ({"a", "c", "e", "i"}, {"g", "h", "k"})
    relative = statements("from .x import y\nfrom . import z\nfrom ..v import w", "p.q.r")
    assert [name for name, _, _ in relative] == ["p.q.x", "p.q", "p.v"]
    assert statements("from . import z", "p.q", package=True) == [("p.q", "z", False)]


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a", "e"}, "e": set()}) == [["a", "b", "c"]]


def test_no_modules_import_each_other():
    assert circles(graph()) == []


def test_no_folders_of_the_library_import_each_other():
    """Folders that are not inside each other, entry points aside."""
    folders: dict[str, set[str]] = {}

    def folder(name: str) -> str:
        return name if ALL[name].name == "__init__.py" else name.rpartition(".")[0]

    for name, targets in graph().items():
        if name in PROGRAMS or name.endswith("__main__") or not inside(name, "jaxmodels"):
            continue
        for target in targets:
            here, there = folder(name), folder(target)
            if here not in (there, there.rpartition(".")[0]) and not inside(there, here) and not inside(here, there):
                folders.setdefault(here, set()).add(there)
    nodes = {*folders, *(target for targets in folders.values() for target in targets)}
    assert circles({node: folders.get(node, set()) for node in nodes}) == []


def test_nothing_imports_an_entry_point():
    for name, targets in graph().items():
        if name not in PROGRAMS and not name.endswith("__main__"):
            assert not targets & PROGRAMS, name


def test_the_packages_are_where_they_are_looked_for():
    assert len(modules("jaxmodels")) > 40
    assert len(modules("torch_ref")) > 4


@each_module("jaxmodels")
def test_jaxmodels_needs_the_core_alone(name):
    at_once, later = imports(ALL[name].read_text())
    allowed = CORE | {"jaxmodels"}
    if name == "jaxmodels.scoring.lm_eval":  # a subclass of lm-eval's, imported by lm-eval
        allowed = allowed | {"lm_eval", "tqdm"}
    assert at_once <= (
        allowed | TRAINING if inside(name, "jaxmodels.training", "jaxmodels.retro.retrieval") else allowed
    )
    assert not (at_once | later) & (OWN - {"jaxmodels"})
    if not inside(name, *TORCH_FILES):
        assert "torch" not in at_once | later


@each_module("jaxmodels")
def test_the_layers_of_jaxmodels(name):
    """weights knows nothing, io knows weights, models know both, convert and training know models."""
    found = {target.split(".")[1] for target in graph()[name] if target.startswith("jaxmodels.")} - {"process"}
    if inside(name, "jaxmodels.weights"):
        assert found <= {"weights"}
    elif inside(name, "jaxmodels.io"):
        assert found <= {"io", "weights"}
    elif not inside(name, "jaxmodels.convert", "jaxmodels.training") and name not in {"jaxmodels", *PROGRAMS}:
        assert "convert" not in found
        assert "training" not in found or inside(name, "jaxmodels.retro.retrieval")


@each_module("torch_ref")
def test_torch_ref_imports_torch_alone(name):
    at_once, later = imports(ALL[name].read_text())
    assert at_once | later <= {"torch", "torch_ref"}


@each_module("train")
def test_train_imports_no_torch(name):
    at_once, later = imports(ALL[name].read_text())
    assert not (at_once | later) & {"torch", "torch_ref", "parity", "bench", "tests"}


@each_module("parity")
def test_parity_imports_neither_training_nor_benchmarks(name):
    at_once, later = imports(ALL[name].read_text())
    assert not (at_once | later) & {"train", "bench", "tests"}
    assert not any(inside(target, "jaxmodels.training") for target in graph()[name])


def modules_after(statement: str) -> set[str]:
    """Packages that a fresh Python has loaded after a statement."""
    program = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_jaxmodels_loads_nothing_heavy():
    assert not modules_after("import jaxmodels") & {"torch", "orbax", "flax", "jax"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "statement",
    [
        "from jaxmodels.transformer import AutoregressiveTransformer; from jaxmodels.generate import generate",
        "from jaxmodels.convert import from_torch, to_torch, load_into_torch",
        "from jaxmodels.convert.neox import load_neox; import jaxmodels.neox",
        "import jaxmodels.neox; from jaxmodels.convert.neox import load_neox",
        "import jaxmodels; jaxmodels.save, jaxmodels.load",
    ],
)
def test_the_product_loads_no_torch(statement):
    loaded = modules_after(statement)
    assert not loaded & {"torch", "torch_ref"}
    assert "jax" in loaded


def test_importing_parity_loads_neither_torch_nor_jax():
    assert not modules_after("import parity") & {"torch", "torch_ref", "jax"}
