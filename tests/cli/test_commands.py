from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import effref as package
import pytest
from effref.main import COMMANDS
from strategies import fits

from refimpl.config import presets
from refimpl.methods import CATALOG

from .conftest import error_of


def run(*arguments: str, **given) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False, **given)


EFFREF = f"{sys.executable} -m effref"


def shell(command: str, **given) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, **given)


@pytest.mark.parametrize("command", [*COMMANDS, "models list", "models fetch"])
def test_help_has_an_example(effref, command: str) -> None:
    result = effref(*command.split(), "--help")
    assert result.exit_code == 0
    assert "Example" in result.stdout
    assert f"effref {command}" in result.stdout


def test_bare_command_helps(effref) -> None:
    result = effref()
    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout


def test_unknown_command(effref) -> None:
    assert "did you mean 'measure'" in error_of(effref("mesure"))


def test_groups_know_their_commands_too(effref) -> None:
    assert "did you mean 'list'? known: fetch, list" in error_of(effref("models lst"))
    assert "known: build, inspect, profile" in error_of(effref("memo open"))
    alone = effref("memo")
    assert (alone.exit_code, alone.stderr) == (0, "")
    assert "effref memo build" in alone.stdout


@pytest.mark.parametrize(
    "words",
    [
        "calibrate --seconds nan", "measure --fail-above nan", "crossover --max-seconds NaN",
        "fidelity --max-seconds nan", "sweep grid.toml --max-seconds nan", "memo build maps --held-out nan",
        "memo profile maps --tau nan",
    ],
)  # fmt: skip
def test_nan_is_no_number(effref, words: str) -> None:
    """Refused at once, not by what it breaks later: a calibration without passes, a database of no part of a text."""
    assert "nan is no number" in error_of(effref(*words.split()))


def test_version_is_the_package_s() -> None:
    pyproject = Path(__file__).parents[2] / "pyproject.toml"
    assert package.__version__ == tomllib.loads(pyproject.read_text())["project"]["version"]


def test_python_surface() -> None:
    assert {"estimate", "measure", "calibrate"} <= set(package.__all__)
    for name in package.__all__[1:]:
        assert callable(getattr(package, name))
        assert callable(getattr(package, name))  # no module of the same name takes its place
    with pytest.raises(AttributeError, match="nothing"):
        _ = package.nothing


@pytest.mark.parametrize("kind", ["methods", "models", "hardware", "components"])
def test_list(effref, kind: str) -> None:
    result = effref("list", kind)
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 120
    rows = json.loads(effref("list", kind, "--format", "json").stdout)[kind]
    assert all(
        str(row[kind.removesuffix("s")] if kind != "hardware" else row["hardware"]) in result.stdout for row in rows
    )


def test_list_knows_everything(effref) -> None:
    text = effref("list").stdout
    for name in (*CATALOG, *presets(), "h100-sxm", "weighted-sum"):
        assert name in text
    assert "did you mean" in error_of(effref("list method")) or "methods" in error_of(effref("list method"))


def test_explain_dense_states_the_textbook_cost(effref) -> None:
    text = effref("explain --method dense --model bert-base").stdout
    assert "2 B T² d" in text
    assert "4 B T² d + 8 B T d²" in text


def test_explain_tells_compute_from_reuse_layers(effref) -> None:
    found = json.loads(effref("explain --method reuse --model bert-base --format json").stdout)
    kinds = {layer["kind"]: layer for layer in found["layers"]}
    assert {kind: layer["count"] for kind, layer in kinds.items()} == {"compute layer": 6, "reuse layer": 6}
    assert kinds["reuse layer"]["total"]["matmul_flops"] == "2*B*T**2*d + 4*B*T*d**2"
    assert found["parameters"][0]["name"] == "group"


@pytest.mark.parametrize("name", CATALOG)
@pytest.mark.parametrize("model", ["conformer-m", "bert-base", "gpt2", "smollm2-135m"])
def test_explained_formulas_equal_the_closed_form(name: str, model: str) -> None:
    import sympy
    from effref.explanation import explain

    import costmodel
    from refimpl.components import FEED_FORWARD, HEAD
    from refimpl.config import Workload

    config = presets()[model]
    if not fits(name, {}, config):
        pytest.skip(f"{name} with its defaults does not take {model}")
    values = {
        "T": 320,  # above every window and length by default, as a symbol is
        "B": 3,
        "d": config.d_model,
        "H": config.heads,
        "Hkv": config.kv_heads,
        "D": config.head_dim,
        "b": 4,
    }
    explained: dict[str, int] = {}
    for layer in explain(name, model).layers:
        for component, row in layer.formulas.items():
            number = row["bytes_read"].subs({s: values[str(s)] for s in row["bytes_read"].free_symbols})
            assert number == sympy.Integer(number)
            explained[component] = explained.get(component, 0) + int(number) * layer.count
    closed = costmodel.estimate(name, config, Workload(320, 3)).by_component()
    assert explained == {component: closed[component].bytes_read for component in explained}
    assert not {FEED_FORWARD, HEAD} & set(explained)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--method resue", "did you mean 'reuse'"),
        ("", "--method"),
        ("--method dense --set reuse.group=2", "not among the methods"),
        ("--method reuse --set reuse.group=-1", "at least 1"),
        ("--method reuse --model bart-base", "did you mean 'bert-base'"),
    ],
)
def test_explain_refuses(effref, arguments: str, said: str) -> None:
    assert said in error_of(effref("explain", *arguments.split()))


def test_calibrate_prints_residuals_and_keeps_the_profile(effref, calibrated, cache: Path, tmp_path: Path) -> None:
    result = effref("calibrate", "--engine", "numpy", "--threads", "1", "--seconds", "2")
    assert result.exit_code == 0
    assert calibrated == [("numpy", 1, "float32", {"seconds": 2.0})]
    assert "whole passes" in result.stdout
    assert len(list((cache / "profiles").glob("*.json"))) == 1
    assert "calibrated" in effref("list", "hardware").stdout
    place = tmp_path / "profile.json"
    assert effref("calibrate", "--engine", "numpy", "--threads", "1", "--output", str(place)).exit_code == 0
    assert effref("estimate", "--seq", "8", "--hardware", str(place)).exit_code == 0


def test_models_list_and_fetch(effref, monkeypatch) -> None:
    from refimpl.weights import pretrained

    asked: list[tuple[str, bool]] = []

    def fetch(name, progress, force):
        progress(f"downloading {name}")
        asked.append((name, force))
        return Path("/models") / name

    monkeypatch.setattr(pretrained, "fetch", fetch)
    assert "minilm-l6" in effref("models list").stdout
    assert effref("models").stdout == effref("models list").stdout
    result = effref("models fetch all --force")
    assert asked == [(name, True) for name in pretrained.available()]
    assert "downloading minilm-l6" in result.stderr
    assert "/models/minilm-l6" in result.stdout


def test_fetch_of_an_unknown_model(effref) -> None:
    assert "did you mean 'minilm-l6'" in error_of(effref("models fetch minilm-l7"))


def test_a_cache_of_an_unknown_user_is_a_folder_like_any(effref, monkeypatch) -> None:
    monkeypatch.setenv("EFFREF_CACHE", "~nobody-of-this-name/cache")
    assert effref("list hardware").exit_code == 0


# --- processes ------------------------------------------------------------------------------------------------------


def test_module_and_exit_code() -> None:
    done = run("-m", "effref", "estimate", "--seq", "zero")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("words", ["list", "--help", "estimate --help", "--version", "sweep --example"])
def test_closed_pipe_is_quiet(words: str) -> None:
    """Also where the reader has left before the first line, and whatever writes: 1 is the exit code of a gate."""
    done = shell(f"{EFFREF} {words} | true; exit ${{PIPESTATUS[0]}}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("where", "said"), [("> /dev/full", "No space left on device; make room"), (">&-", "stdout is closed")]
)
def test_a_result_that_cannot_be_written_is_one_line(where: str, said: str) -> None:
    for words in ("list", "--help"):
        done = shell(f"{EFFREF} {words} {where}")
        assert done.returncode == 2
        assert done.stderr.startswith("effref: error: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("where", ["2> /dev/full", "2>&-", "2> >(exec true)"])
def test_notes_that_nobody_takes_cost_no_result(where: str, tmp_path: Path) -> None:
    """A note precedes this result, and a line that the file is written follows."""
    done = shell(f"{EFFREF} estimate --seq 64 --threads 1 --output result.json {where}", cwd=tmp_path)
    assert done.returncode == 0
    assert json.loads((tmp_path / "result.json").read_text())["results"]
    assert shell(f"{EFFREF} estimate --seq zero {where}").returncode == 2


def test_a_command_that_is_terminated_leaves_no_half_file(tmp_path: Path) -> None:
    """As Ctrl-C does: what was done until then is kept, under its own name."""
    sizes = "seq = { from = 16, to = 40000 }\n[model]\nname = 'minilm-l6'\nlayers = [1, 2, 3, 4, 5, 6]\n"
    (tmp_path / "grid.toml").write_text(f"[workload]\n{sizes}")
    command = [sys.executable, "-m", "effref", "sweep", "grid.toml", "--threads", "1", "--output", "rows.csv"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        while not any(half.stat().st_size > 500_000 for half in tmp_path.glob(".rows*.csv")):  # of 200 MB
            assert process.poll() is None
            time.sleep(0.01)
        process.terminate()
        assert process.wait(60) == 130
    assert {path.name for path in tmp_path.iterdir()} == {"grid.toml", "rows.csv"}


def test_a_closed_stdout_is_not_needed_for_a_file(tmp_path: Path) -> None:
    done = shell(f"{EFFREF} list --format json --output list.json >&-", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "effref: wrote list.json\n")
    assert "methods" in json.loads((tmp_path / "list.json").read_text())


def test_estimate_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom effref.main import main\n"
        "try: main(['estimate', '--seq', '4096', '--method', 'reuse'])\nexcept SystemExit as e: assert not e.code\n"
        "heavy = {'numba', 'cupy', 'scipy', 'sympy', 'matplotlib', 'cpuinfo', 'psutil', 'threadpoolctl'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_estimate_answers_at_once() -> None:
    import statistics
    import time

    def seconds(*arguments: str) -> float:
        start = time.perf_counter()
        assert run(*arguments, env=os.environ | {"PYTHONDONTWRITEBYTECODE": ""}).returncode == 0
        return time.perf_counter() - start

    ours = ("-m", "effref", "estimate", "--seq", "4096", "--method", "reuse")
    seconds(*ours)
    ratios = [seconds(*ours) / seconds("-c", "import numpy, click") for _ in range(7)]
    assert statistics.median(ratios) < 2, ratios


def test_a_bug_is_one_line(effref, monkeypatch) -> None:
    from effref import request

    import costmodel

    def broken(*args):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(costmodel, "estimate", broken)
    assert request.costmodel is costmodel
    assert "bug in effref (ZeroDivisionError" in error_of(effref("estimate --seq 8"))
