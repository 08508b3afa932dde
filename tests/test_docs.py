"""The documentation is run: its code, commands, formula tables, lists of names and links.

CONTRIBUTING.md, "How pages are tested", states the conventions that are read here.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import io
import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import sympy
from strategies import ON_HEADS

import costmodel
from costmodel.methods import COSTS
from costmodel.ops import FORMULAS as OPS
from refimpl.components import ATTENTION, COMPONENTS, HEAD, MEMO, OUTPUT, POSITIONS, QKV, SCORES, SOFTMAX, WEIGHTED_SUM
from refimpl.config import ModelConfig, Workload
from refimpl.methods import CATALOG
from refimpl.methods.programs import PROGRAMS
from refimpl.parameters import PARAMETERS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *(page for name in ("README.md", "CONTRIBUTING.md") if (page := ROOT / name).is_file()),
    *sorted(page for page in DOCS.rglob("*.md") if "_build" not in page.parts),
]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


# --- reading pages ------------------------------------------------------------------------------------------------


@dataclass
class Block:
    """A fenced block: its language, first line's number, text, test marker, and expected output where one follows."""

    language: str
    line: int
    text: str
    marker: str = ""
    output: str | None = None

    @property
    def skipped(self) -> bool:
        return self.marker.startswith("skip")


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page; a ```text block directly after code is that code's output."""
    found: list[Block] = []
    lines = page.read_text("utf-8").splitlines()
    last_text, after_code, index = "", False, 0
    while index < len(lines):
        fence = re.match(r"(`{3,})([\w{}-]*)", lines[index])
        if not fence:
            if lines[index].strip():
                last_text, after_code = lines[index].strip(), False
            index += 1
            continue
        end = lines.index(fence[1], index + 1)
        text = "\n".join(lines[index + 1 : end]) + "\n"
        if fence[2] == "text" and after_code:
            found[-1].output, after_code = text, False
        else:
            marker = re.fullmatch(r"<!-- test: (.*) -->", last_text)
            found.append(Block(fence[2], index + 2, text, marker[1] if marker else ""))
            after_code = fence[2] in ("python", "console")
        last_text, index = "", end + 1
    return found


def tables(page: Path, kind: str) -> Iterator[tuple[str, list[list[str]]]]:
    """The tables after a ``<!-- kind: what -->`` comment: what, and the rows of cells below the header."""
    pattern = rf"<!-- {kind}:? ?(.*?) -->\n+((?:\|.*\n)+)"
    for what, table in re.findall(pattern, page.read_text("utf-8") + "\n"):
        rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        yield what, rows[2:]


def agree(expected: str, printed: str) -> None:
    """Equal line by line; ``...`` in the page stands for anything."""
    expected, printed = (re.sub(r"[ \t]+$", "", text.rstrip(), flags=re.M) + "\n" for text in (expected, printed))
    assert doctest.OutputChecker().check_output(expected, printed, doctest.ELLIPSIS), (
        f"the page says\n{expected}\nbut printed is\n{printed}"
    )


# --- code ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def catalogues() -> Iterator[None]:
    """Pages may add a method for a while."""
    kept = [(table, dict(table)) for table in (CATALOG, PARAMETERS, PROGRAMS, COSTS)]
    yield
    for table, before in kept:
        table.clear()
        table.update(before)


@EVERY_PAGE
@pytest.mark.usefixtures("catalogues")
def test_python_blocks_run_and_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In order, in one namespace per page."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language != "python" or block.skipped:
            continue
        tree = ast.increment_lineno(ast.parse(block.text), block.line - 1)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(tree, str(page), "exec", dont_inherit=True), namespace)
        if block.output is not None:
            agree(block.output, printed.getvalue())


COMMANDS = [
    pytest.param(
        block, id=f"{page.relative_to(ROOT)}:{block.line}", marks=[pytest.mark.slow] * block.marker.startswith("slow")
    )
    for page in PAGES
    for block in blocks(page)
    if block.language == "console" and not block.skipped and "$ effref" in block.text
]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A folder and an environment of their own, with this interpreter's ``effref`` first."""
    folder = tmp_path_factory.mktemp("shell")
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {"cwd": folder, "env": {**os.environ, "PATH": path, "EFFREF_CACHE": str(folder / "cache")}}


@pytest.mark.parametrize("block", COMMANDS)
def test_commands_of_the_pages_exit_with_0(block: Block, shell: dict[str, Any]) -> None:
    """Every ``$ effref ...`` line; a line that ends in a backslash goes on."""
    printed = ""
    for command in re.findall(r"^\$ (effref(?:.*\\\n)*.*)$", block.text, flags=re.M):
        ran = subprocess.run(command, shell=True, capture_output=True, text=True, **shell)
        assert ran.returncode == 0, f"{command}\n{ran.stderr}"
        printed += ran.stdout
    if block.output is not None:
        agree(block.output, printed)


# --- formulas -----------------------------------------------------------------------------------------------------

B, T, N, V = sympy.symbols("B T N V", integer=True, positive=True)
d, f, H, HKV, HALF = sympy.symbols("d f H Hkv h", integer=True, positive=True)
D = 2 * HALF  # even, as rotary positions need it
FIGURES = ("matmul_flops", "vector_flops", "bytes_read", "bytes_written")
SUBLAYER = (QKV, POSITIONS, MEMO, SCORES, SOFTMAX, WEIGHTED_SUM, ATTENTION, OUTPUT)
FORMULAS = [
    pytest.param(what, rows, id=f"{page.stem}: {what}")
    for page in sorted((DOCS / "methods").glob("*.md"))
    for what, rows in tables(page, "formulas")
]


@pytest.mark.parametrize(("what", "rows"), FORMULAS)
def test_formula_tables_equal_the_cost_model(what: str, rows: list[list[str]]) -> None:
    """Op by op, in symbols, with and without bias and causal mask; elements are bytes at one byte each."""
    method, *settings = what.split()
    given = dict(setting.split("=") for setting in settings)
    layer, position, only = int(given.pop("layer", 1)), given.pop("position", "none"), given.pop("only", None)
    masks = (constant(given.pop("causal")),) if "causal" in given else (False, True)
    of_head = only == HEAD
    for bias, causal, (heads, reused) in itertools.product((0, 1), masks, head_counts(given)):
        letters = {"B": B, "T": T, "N": T * (T + 1) / 2 if causal else T * T, "d": d, "D": D, "bias": bias}
        letters |= {"R": T if causal else 2 * T - 1}  # offsets of relative positions that meet a key
        letters |= {"H": heads, "P": reused, "Hkv": heads if position == "relative" or reused else HKV}
        letters |= {"V": V, "W": 3 + 4 * bias, "n": 5 + 6 * bias}  # two pairs of sizes of a preview and of its choice
        config = ModelConfig(
            "symbols", "post-norm", layer, d, heads, f, kv_heads=letters["Hkv"], head_dim=D, bias=bool(bias),
            position=position, vocab=V if of_head else 1, head=method in ON_HEADS,
        )  # fmt: skip
        sizes = {"P": reused, "W": letters["W"], "n": letters["n"]}
        params = {name: sizes[value] if value in sizes else constant(value) for name, value in given.items()}
        letters |= {"causal": int(causal), "k": params.get("length")}  # of linformer
        if method == "local":
            w = letters["w"] = params["window"]  # T is above it
            letters |= {"N": T * (w + 1) - w * (w + 1) / 2 if causal else T * (2 * w + 1) - w * (w + 1)}
            letters |= {"R": w + 1 if causal else 2 * w + 1}
        letters |= {"rho": sympy.nsimplify(params.get("kept", 1))}  # the part of pairs that latte keeps
        ops = ops_of_layer(method, config, Workload(T, B, causal=causal), params, layer, only)
        steps = [row for row in rows if not row[0].startswith("total")]
        assert [(row[0], row[1]) for row in steps] == [(op.component, named(op)) for op in ops]
        for row, op in zip(steps, ops, strict=True):
            assert_equal(row, [getattr(op.cost(1), figure) for figure in FIGURES], letters)
        if steps != rows and not (bias or causal):
            plain = {HKV: heads, d: heads * D}  # the last row takes Hkv = H and H D = d
            figures = [sum(getattr(op.cost(1), figure) for op in ops).subs(plain) for figure in FIGURES]
            assert_equal(rows[-1], figures, {**letters, "d": heads * D})


def constant(text: str) -> Any:
    """A number, True or False, or else a word."""
    try:
        return ast.literal_eval(text)
    except ValueError:
        return text


def head_counts(given: dict[str, str]) -> list[tuple[Any, Any]]:
    """Numbers of heads and of reused heads: symbols, or pairs of numbers where part of the heads is reused."""
    return [(5, 2), (4, 1), (3, 2)] if "P" in given.values() else [(H, 0)]


def ops_of_layer(
    method: str, config: ModelConfig, workload: Workload, params: dict[str, Any], layer: int, only: str | None
) -> list[Any]:
    """The ops of the last attention sublayer: all of them less those of the same model with one layer less."""

    def ops(layers: int) -> list[Any]:
        shorter = ModelConfig(**{**vars(config), "layers": layers})
        found = costmodel.estimate(method, shorter, workload, params).ops
        return [op for op in found if op.component in (HEAD if only == HEAD else SUBLAYER) and op.calls]

    before = len(ops(layer - 1)) if layer > 1 and only != HEAD else 0
    return [op for op in ops(layer)[before:] if only in (None, op.component)]


def named(op: Any) -> str:
    return f"`{op.name}`" if op.calls == 1 else f"`{op.name}` x {op.calls}"


def assert_equal(row: list[str], figures: list[Any], letters: dict[str, Any]) -> None:
    for cell, figure in zip(row[2:], figures, strict=True):
        written = sympy.sympify(cell.strip("`"), locals=letters)
        figure = sympy.sympify(figure).replace(sympy.floor, lambda inside: inside)  # T (T - 1) / 2 is whole
        assert sympy.expand(written - figure) == 0, f"{row[:2]}: the page says {cell}, the code {sympy.factor(figure)}"


def test_every_method_page_has_formula_tables() -> None:
    marked = sum(page.read_text("utf-8").count("<!-- formulas") for page in (DOCS / "methods").glob("*.md"))
    assert marked == len(FORMULAS), "a table does not follow its comment"
    for method in CATALOG:
        assert any(what.split()[0] == method for what, _ in tables(DOCS / "methods" / f"{method}.md", "formulas")), (
            method
        )


# --- lists of names -----------------------------------------------------------------------------------------------


def test_component_table_is_that_of_the_code() -> None:
    (_, rows), *_ = tables(DOCS / "notation.md", "components")
    assert rows == [[f"`{name}`", about] for name, about in COMPONENTS.items()]


@pytest.mark.parametrize("method", CATALOG)
def test_parameter_tables_are_those_of_the_code(method: str) -> None:
    """Names, in order, with their defaults."""
    wanted = [
        [f"`{field.name}`", f"`{field.default!r}`".replace("'", "") if field.default is not None else "none"]
        for field in fields(PARAMETERS[method])
        if field.default is not MISSING
    ]
    found = [row[:2] for _, rows in tables(DOCS / "methods" / f"{method}.md", "parameters") for row in rows]
    assert found == wanted


PATH = re.compile(r"`((?:refimpl|costmodel|cli|tests|docs|\.ci)/[\w/<>.-]*)(?:::([\w.]+))?`")


@EVERY_PAGE
def test_paths_and_names_of_code_exist(page: Path) -> None:
    """`refimpl/methods/reuse.py::Reuse` must be there; <name> in a path stands for any method."""
    for path, name in PATH.findall(page.read_text("utf-8")):
        place = ROOT / path.replace("<name>", "reuse")
        assert place.exists(), f"{page.name}: {path}"
        if name:
            pattern = rf"^ *(def|class) {name}\b|^{name}\b.*="
            assert re.search(pattern, place.read_text("utf-8"), flags=re.M), f"{page.name}: {path}::{name}"


# --- links and build ----------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@EVERY_PAGE
def test_internal_links_resolve(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.M | re.S)):
        if "://" in link or link.startswith("mailto:"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("sphinx", "myst_parser", "furo")),
    reason="needs pip install 'effref[docs]'",
)
def test_documentation_builds_without_warnings(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(tmp_path / "html")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("script", ["measured", "combinations"])
def test_filled_tables_are_those_of_their_script(script: str) -> None:
    """Accuracy from the stored results; what combines with what from the code."""
    spec = importlib.util.spec_from_file_location(script, DOCS / f"{script}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = module.PAGE.read_text("utf-8")
    assert module.filled(text) == text, f"run: python docs/{script}.py"


def test_table_of_the_combined_op_is_the_cost_model_s() -> None:
    """The row of `filtered_map`, in symbols; at one byte an element."""
    sizes = {"maps": B * H, "kv_maps": B * HKV, "q_len": T, "k_len": T, "head_dim": D, "causal": 0, "mask": 0}
    rho = sympy.Symbol("rho")
    kept = {"heads": H, "exact": 0, "kept": rho * B * H * T * T}
    row = next(
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in (DOCS / "composition.md").read_text("utf-8").splitlines()
        if "| `filtered_map` |" in line
    )
    cost = OPS["filtered_map"](1, **sizes, **kept)
    letters = {"B": B, "T": T, "N": T * T, "D": D, "H": H, "Hkv": HKV, "rho": rho}
    assert_equal(row, [getattr(cost, figure) for figure in FIGURES], letters)
