"""The arrows between the packages, and what importing them loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import effref
import pytest

import costmodel
import refimpl
from costmodel.methods import COSTS
from refimpl.methods import CATALOG
from refimpl.methods.programs import PROGRAMS
from refimpl.parameters import PARAMETERS

WORDS = {"refimpl.config", "refimpl.components", "refimpl.errors", "refimpl.registry"}
ROOT = Path(__file__).parents[1]


def _imports(package: str) -> set[str]:
    found: set[str] = set()
    for module in {"refimpl": refimpl, "costmodel": costmodel, "effref": effref}[package].__path__:
        for path in Path(module).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module)
                elif isinstance(node, ast.Import):
                    found.update(alias.name for alias in node.names)
    return found


def test_reference_implementation_imports_neither_cost_model_nor_command_line() -> None:
    assert not [name for name in _imports("refimpl") if name.split(".")[0] in ("costmodel", "effref", "cli")]


def test_cost_model_imports_only_words_of_the_reference_implementation() -> None:
    assert not [name for name in _imports("costmodel") if name.split(".")[0] in ("effref", "cli")]
    used = {name for name in _imports("costmodel") if name.split(".")[0] == "refimpl"}
    assert {name for name in used if not name.startswith("refimpl.parameters")} <= WORDS


@pytest.mark.parametrize("statement", ["import refimpl", "import costmodel", "import effref"])
def test_import_loads_numpy_only(statement: str) -> None:
    heavy = ["numba", "cupy", "scipy", "sympy", "matplotlib", "torch", "tokenizers", "safetensors", "gguf"]
    check = f"{statement}; import sys; print([m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("method", CATALOG)
def test_method_has_its_file_in_every_folder(method: str) -> None:
    """The same name: program, closed form, page, and a test that names it."""
    module = method.replace("-", "_")
    assert (Path(refimpl.__path__[0]) / "methods" / f"{module}.py").is_file()
    assert (Path(costmodel.__path__[0]) / "methods" / f"{module}.py").is_file()
    assert (ROOT / "docs" / "methods" / f"{method}.md").is_file()
    assert any(module in path.name for path in (ROOT / "tests" / "methods").glob("test_*.py"))


def test_catalogue_programs_and_closed_forms_agree() -> None:
    assert list(CATALOG) == list(PARAMETERS) == list(PROGRAMS) == list(COSTS)
