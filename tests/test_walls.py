"""Who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OWN = {"jaxmodels", "torch_ref", "parity", "train", "bench", "tests"}
CORE = {"jax", "flax", "numpy", "ml_dtypes"}  # ml_dtypes: numpy's bfloat16, which jax itself needs


def imports(source: str) -> tuple[set[str], set[str]]:
    """Packages that a module imports when it is imported itself, and those that it imports later, in functions."""
    at_once, later = set(), set()

    def visit(node: ast.AST, found: set[str]) -> None:
        match node:
            case ast.Import():
                found.update(alias.name.split(".")[0] for alias in node.names)
            case ast.ImportFrom(level=0, module=str(module)):
                found.add(module.split(".")[0])
            case ast.If(test=ast.Name("TYPE_CHECKING")):
                found = later
        inside = later if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else found
        for child in ast.iter_child_nodes(node):
            visit(child, inside)

    visit(ast.parse(source), at_once)
    return at_once - sys.stdlib_module_names, later - sys.stdlib_module_names


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def each_module(*packages):
    found = [path for package in packages for path in modules(package)]
    return pytest.mark.parametrize("path", found, ids=[str(path.relative_to(ROOT)) for path in found])


def test_imports_are_found_wherever_they_stand():
    source = "import a.b\nfrom c import d\nfrom .x import y\nimport os\nif True:\n  import e\ndef f():\n  import g\n"
    source += "if TYPE_CHECKING:\n  import h\nclass I:\n  import i\n  def j(self):\n    if self: from k.l import m\n"
    assert imports(source) == ({"a", "c", "e", "i"}, {"g", "h", "k"})


def test_the_packages_are_where_they_are_looked_for():
    assert len(modules("jaxmodels")) > 10
    assert len(modules("torch_ref")) > 4


@each_module("jaxmodels")
def test_jaxmodels_needs_the_core_alone(path):
    at_once, later = imports(path.read_text())
    assert at_once <= CORE | {"jaxmodels"}
    assert not (at_once | later) & (OWN - {"jaxmodels"})
    if "convert" not in path.relative_to(ROOT).parts:
        assert "torch" not in later


@each_module("torch_ref")
def test_torch_ref_imports_torch_alone(path):
    at_once, later = imports(path.read_text())
    assert at_once | later <= {"torch", "torch_ref"}


@each_module("train")
def test_train_imports_no_torch(path):
    at_once, later = imports(path.read_text())
    assert not (at_once | later) & {"torch", "torch_ref", "parity", "bench", "tests"}


@each_module("parity")
def test_parity_imports_neither_training_nor_benchmarks(path):
    at_once, later = imports(path.read_text())
    assert not (at_once | later) & {"train", "bench", "tests"}


def modules_after(statement: str) -> set[str]:
    """The packages that a fresh Python has loaded after a statement."""
    program = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_jaxmodels_loads_nothing_heavy():
    assert not modules_after("import jaxmodels") & {"torch", "orbax", "flax", "jax"}


@pytest.mark.parametrize(
    "statement",
    [
        "from jaxmodels.transformer import AutoregressiveTransformer; from jaxmodels.generate import generate",
        "from jaxmodels.convert import from_torch, to_torch, load_into_torch",
        "import jaxmodels; jaxmodels.save, jaxmodels.load",
    ],
)
def test_the_product_loads_no_torch(statement):
    loaded = modules_after(statement)
    assert not loaded & {"torch", "torch_ref"}
    assert "jax" in loaded


@pytest.mark.skipif(not modules("parity"), reason="there is no parity package yet")
def test_importing_parity_loads_no_torch():
    assert not modules_after("import parity") & {"torch", "torch_ref"}
