"""The CUDA sources: each stands alone, compiles for the device, and keeps to the registers and memory of its blocks."""

from __future__ import annotations

import importlib
import math
import pkgutil
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from refimpl.engines import cuda
from refimpl.engines.cuda import launch, shapes
from refimpl.engines.cuda.launch import Source


def sources():
    """Every source that a module of the package names."""
    modules = [
        importlib.import_module(f"{cuda.__name__}.{module.name}") for module in pkgutil.iter_modules(cuda.__path__)
    ]
    found = {value.file: value for module in modules for value in vars(module).values() if isinstance(value, Source)}
    return [found[file] for file in sorted(found)]


SOURCES = sources()


def test_every_file_of_kernels_has_its_source():
    assert [source.file for source in SOURCES] == sorted(file.name for file in launch.FOLDER.glob("*.cu"))


def test_sources_stand_alone_with_each_include_once():
    for source in SOURCES:
        assert '#include "' not in source.text
        assert source.text.count("typedef long long Index;") == 1


def test_lines_are_as_short_as_python_s():
    for file in sorted(launch.FOLDER.glob("*.cu*")):
        long = [n for n, line in enumerate(file.read_text("utf-8").splitlines(), 1) if len(line) > 120]
        assert not long, f"{file.name}: lines {long}"


CASES = [pytest.param(source, dtype, id=f"{source.file}-{dtype}") for source in SOURCES for dtype in source.dtypes]


def ptx(source, dtype):
    """A source's kernels of one dtype compiled by nvcc or NVRTC, whichever is here."""
    if shutil.which("nvcc"):
        return _ptx_by_nvcc(source, dtype)
    return _ptx_by_nvrtc(source, dtype)


def _ptx_by_nvcc(source, dtype):
    kept = "".join(
        f"template __global__ void {name}({', '.join(_parameters(source, name))});\n"
        for name in source.instances(dtype)
    )
    done = subprocess.run(
        ["nvcc", "-std=c++17", f"-arch=compute_{source.capability}", "-ptx", "-x", "cu", "-", "-o", "/dev/stdout"],
        input=source.text + kept, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def _parameters(source, name):
    """The parameter types of an instance, read from its declaration."""
    step, given = re.fullmatch(r"(\w+)<(.*)>", name).groups()
    declaration = rf"template <([^>]*)>\s*__global__ void (?:__launch_bounds__\([^)]*\) )?{step}\(([^)]*)\)"
    types_, declared = re.search(declaration, source.text).groups()
    values = dict(zip(re.findall(r"\w+ (\w+)(?:,|$)", types_), given.split(", "), strict=True))
    kinds = [parameter.strip().rsplit(" ", 1)[0] for parameter in declared.split(",")]
    return [re.sub(r"\b\w+\b", lambda match: values.get(match[0], match[0]), kind) for kind in kinds]


def _ptx_by_nvrtc(source, dtype):
    reason = "neither nvcc nor NVRTC with the CUDA headers to compile the kernels"
    nvrtc = pytest.importorskip("cupy", reason=reason).cuda.nvrtc
    headers = pytest.importorskip("nvidia.cuda_runtime", reason=reason)
    include = Path(next(iter(headers.__path__))) / "include"
    program = nvrtc.createProgram(source.text, "kernels.cu", (), ())
    for name in source.instances(dtype):
        nvrtc.addNameExpression(program, name)
    nvrtc.compileProgram(program, ("--std=c++17", f"-arch=compute_{source.capability}", f"-I{include}"))
    text = nvrtc.getPTX(program)
    return text.decode() if isinstance(text, bytes) else text


@pytest.mark.slow
@pytest.mark.parametrize(("source", "dtype"), CASES)
def test_sources_compile_for_the_device(source, dtype, tmp_path):
    text = ptx(source, dtype)
    assert len(re.findall(r"\.entry", text)) == len(source.instances(dtype))
    if dtype != "float64":
        wide = re.findall(r"\b(?:add|sub|mul|fma|div|sqrt)\.(?:rn\.)?f64", text)
        assert not wide, "float32 and float16 must not compute in double"
    if not shutil.which("ptxas"):
        pytest.skip("compiled; no ptxas to assemble the kernels")
    (tmp_path / "kernels.ptx").write_text(text)
    arch = 90 if source.capability >= 80 else source.capability  # an H100 is 9.0
    done = subprocess.run(
        ["ptxas", "-v", f"-arch=sm_{arch}", "kernels.ptx", "-o", "kernels.cubin"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not [n for n in re.findall(r"(\d+) bytes spill", done.stderr) if n != "0"], done.stderr
    threads = _threads(text)
    for name, registers in re.findall(r"Compiling entry function '(\w+)'.*?Used (\d+) registers", done.stderr, re.S):
        assert int(registers) * threads[name] <= 65_536, f"{name}: {registers} registers, {threads[name]} threads"
    assert max(map(int, re.findall(r"(\d+) bytes smem", done.stderr)), default=0) <= 48 << 10


def _threads(text):
    """The most threads of a block of each kernel: what its launch bounds say, else those of a walk along rows."""
    found = re.findall(r"\.entry (\w+)\([^)]*\)\s*(?:\.maxntid (\d+)(?:, (\d+), (\d+))?)?", text)
    return {name: math.prod(int(n or 1) for n in bounds) if bounds[0] else shapes.THREADS for name, *bounds in found}
