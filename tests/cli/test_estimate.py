from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path

import effref as package
import pytest

from costmodel.hardware import presets

from .conftest import TINY, error_of, profile

SMALL = ["estimate", *TINY, "--hardware", "xeon-8480"]


def test_schema(effref) -> None:
    found = json.loads(effref(*SMALL, "--seq", "64", "--method", "reuse", "--format", "json").stdout)
    assert {"schema_version", "context", "config", "hardware", "results", "notes"} == set(found)
    assert {"date", "host", "cpu", "gpu", "threads", "blas", "versions", "commit"} == set(found["context"])
    assert {"name", "level", "source", "fitted_on", "residuals"} <= set(found["hardware"])
    (result,) = found["results"]
    assert {
        "method", "params", "seq", "batch", "phase", "device", "engine", "components", "total", "params_bytes",
        "companion_bytes", "params_reduction", "cache_bytes", "cache_traffic", "peak_bytes", "speedup",
    } == set(result)  # fmt: skip
    assert result["params"]["group"] == 2
    assert {
        "calls", "matmul_flops", "vector_flops", "bytes_read", "bytes_written", "predicted_s", "predicted_low_s",
        "predicted_high_s", "bound",
    } == set(result["total"]) == set(result["components"][0]) - {"component"}  # fmt: skip
    assert set(result["speedup"]) == {"dense", "flash"}


def test_decoding_schema_and_cache(effref) -> None:
    """SmolLM2 after 64 tokens: 30 layers x 2 x 192 wide keys and values, one position appended, 65 read."""
    words = "estimate --phase decode --kv-len 64 --steps 1 --method dense,reuse --hardware xeon-8480 --format json"
    found = json.loads(effref(words).stdout)
    dense, reuse = found["results"]
    assert (dense["seq"], dense["kv_len"], dense["steps"]) == (1, 64, 1)
    assert dense["cache_bytes"] == 65 * 30 * 2 * 192 * 4
    assert dense["cache_traffic"] == {"appended_bytes": 30 * 2 * 192 * 4, "read_bytes": 65 * 30 * 2 * 192 * 4}
    assert dense["tokens_per_s"]["predicted"] == pytest.approx(1 / dense["total"]["predicted_s"])
    assert reuse["cache_bytes"] == 65 * 30 * (192 + 96) * 4  # half of the layers keep no keys
    assert found["config"]["kv_len"] == [64]


def test_steps_of_decoding_add_up() -> None:
    """Three steps in one pass are the passes of one step each, at growing caches."""
    given = {"phase": "decode", "method": "dense", "hardware": "xeon-8480"}
    (together,) = package.estimate(kv_len=10, steps=3, **given)["results"]
    single = package.estimate(kv_len=(10, 11, 12), **given)["results"]
    for name in ("matmul_flops", "vector_flops", "bytes_read", "bytes_written"):
        assert together["total"][name] == sum(one["total"][name] for one in single)


def test_weights_that_no_cache_holds_come_from_memory() -> None:
    """SmolLM2's 538 MB at the DRAM bandwidth of the preset bound a step from below."""
    hardware = presets()["xeon-8480"]
    (found,) = package.estimate(phase="decode", kv_len=8, method="flash", hardware="xeon-8480", threads=56)["results"]
    assert found["total"]["predicted_s"] > found["params_bytes"] / hardware.memory[-1].bandwidth_bytes_per_s


def test_energy(effref) -> None:
    """Joules per component, power at the rate of the input, and the saving against both baselines."""
    words = "estimate --model emformer-rnnt-base --phase decode --method flash --hardware xeon-8480"
    (found,) = json.loads(effref(*words.split(), "--energy", "--format", "json").stdout)["results"]
    parts = found["energy"]["components"]
    assert sum(part["total_j"] for part in parts) == pytest.approx(found["energy"]["total_j"])
    assert found["energy"]["power_w"] == pytest.approx(found["energy"]["total_j"] / 0.16)
    assert {row["component"]: row["energy_j"] for row in found["components"]}.keys() < {p["component"] for p in parts}
    assert found["energy"]["saving"]["flash"] == 0
    text = effref(*words.split(), "--energy", "fp32-dram").stdout
    assert "4 bytes an element" in text
    assert "at the rate of the input" in text
    assert "energy" not in effref(*words.split()).stdout
    assert "did you mean 'int8-dram'" in error_of(effref(*words.split(), "--energy", "int8dram"))


def test_components_add_up(effref) -> None:
    for result in package.estimate(seq=(64, 128), hardware="epyc-9654")["results"]:
        for name in ("calls", "matmul_flops", "vector_flops", "bytes_read", "bytes_written"):
            assert sum(row[name] for row in result["components"]) == result["total"][name]
        seconds = sum(row["predicted_s"] for row in result["components"])
        assert seconds == pytest.approx(result["total"]["predicted_s"], rel=1e-12)


def test_several_lengths_equal_single_ones(effref) -> None:
    together = package.estimate(seq=(32, 64, 1024), hardware="l4")["results"]
    single = [one for seq in (32, 64, 1024) for one in package.estimate(seq=seq, hardware="l4")["results"]]
    assert together == single


def test_speedup_is_the_ratio_of_totals() -> None:
    found = {one["method"]: one for one in package.estimate(seq=2048, hardware="h100-sxm", device="gpu")["results"]}
    seconds = {name: one["total"]["predicted_s"] for name, one in found.items()}
    assert found["reuse"]["speedup"]["flash"]["predicted"] == pytest.approx(seconds["flash"] / seconds["reuse"])
    alone = package.estimate(seq=2048, method="reuse", hardware="h100-sxm", device="gpu")["results"]
    assert alone == [found["reuse"]]


def test_hardware_decides_the_device() -> None:
    assert package.estimate(seq=8, hardware="l4")["results"][0]["device"] == "gpu"
    assert package.estimate(seq=8, hardware="epyc-9654")["results"][0]["engine"] == "numba"


def test_default_model_is_the_method_s_own() -> None:
    assert package.estimate(seq=64, method="reuse", hardware="l4")["config"]["model"]["name"] == "conformer-m"


def test_csv_has_one_row_per_method_length_and_component(effref) -> None:
    text = effref(*SMALL, "--seq", "16,32", "--method", "dense,reuse", "--format", "csv").stdout
    rows = list(csv.DictReader(io.StringIO(text)))
    found = package.estimate(
        seq=(16, 32), method=("dense", "reuse"), hardware="xeon-8480",
        overrides={"layers": 2, "d_model": 32, "heads": 2, "d_ff": 64},
    )["results"]  # fmt: skip
    assert len(rows) == sum(len(one["components"]) + 1 for one in found)
    assert len({(row["method"], row["seq"], row["component"], row["device"]) for row in rows}) == len(rows)
    assert float(rows[0]["predicted_s"]) == found[0]["components"][0]["predicted_s"]


def test_tables_fit_a_terminal(effref) -> None:
    for arguments in (["--seq", "2^8:2^11"], ["--seq", "4096", "--method", "reuse"]):
        result = effref(*SMALL, *arguments)
        assert result.exit_code == 0
        assert max(map(len, result.stdout.splitlines())) <= 120
        assert result.stderr == ""


def test_markdown(effref) -> None:
    text = effref(*SMALL, "--seq", "16", "--method", "flash", "--format", "md").stdout
    assert re.search(r"\| component +\| bound +\| +calls \|", text)
    assert "| **total** " in text


def test_weights_are_compared_with_dense_all_parts_of_the_product_together(effref) -> None:
    """76,738,049 weights: 63,605,760 of the encoder, 8,932,864 of the predictor, 4,199,425 of the joiner."""
    words = "estimate --method folding,dense --set folding.setting=attention-2 --seq 40 --hardware xeon-8480"
    folded, dense = json.loads(effref(f"{words} --format json").stdout)["results"]
    assert dense["params_bytes"] == 4 * 63_605_760
    assert folded["companion_bytes"] == dense["companion_bytes"] == 4 * (8_932_864 + 4_199_425)
    assert folded["params_reduction"] == 1 - (76_738_049 - 20 * 787_456) / 76_738_049
    assert dense["params_reduction"] == 0
    text = effref(words).stdout
    assert "weights 183 MiB and 50.1 MiB in the product's other parts (together 20.5 % less than dense)" in text
    assert "weights 243 MiB and 50.1 MiB in the product's other parts, peak" in text
    assert max(map(len, text.splitlines())) <= 120
    alone = effref("estimate --method reuse --seq 40 --hardware xeon-8480").stdout
    assert "weights 103 MiB (6.2 % less than dense), peak" in alone


def test_baseline_chooses_the_ratio(effref) -> None:
    both = effref(*SMALL, "--seq", "64", "--method", "reuse").stdout
    assert "speed of dense" in both
    assert "speed of flash" in both
    one = effref(*SMALL, "--seq", "64", "--method", "reuse", "--baseline", "flash").stdout
    assert "speed of dense" not in one


def test_without_a_profile_the_nearest_preset_is_scaled_and_said(effref) -> None:
    result = effref("estimate", *TINY, "--seq", "64", "--threads", "2")
    assert result.exit_code == 0
    assert "lower bounds" in result.stderr
    assert "scaled to 2 of" in result.stdout


def test_scaling_shares_compute_and_private_caches() -> None:
    from effref.machines import scaled

    whole = presets()["epyc-9654"]
    part = scaled(whole, 24)
    assert part.matmul_flops_per_s["float32"] == whole.matmul_flops_per_s["float32"] / 4
    sizes = {level.level: level.size_bytes for level in part.memory}
    full = {level.level: level.size_bytes for level in whole.memory}
    assert sizes["L2"] == full["L2"] / 4
    assert sizes["L3"] == full["L3"]
    assert part.memory[-1] == whole.memory[-1]
    assert scaled(whole, 200) is whole


def test_profile_of_this_machine_is_used(effref) -> None:
    from effref import profiles

    profiles.save(profile(), "numba", 3, "float32")
    result = effref("estimate", *TINY, "--seq", "64", "--threads", "3", "--format", "json")
    assert result.stderr == ""
    found = json.loads(result.stdout)
    assert found["hardware"]["level"] == "calibrated"
    total = found["results"][0]["total"]
    assert total["predicted_low_s"] == pytest.approx(0.9 * total["predicted_s"])


def test_a_spec_sheet_has_one_bound_for_recorded_passes_and_others(effref) -> None:
    words = ["estimate", *TINY, "--seq", "64", "--hardware", "l4", "--format", "json"]
    plain, graph = (effref(*words, *more) for more in ([], ["--graph"]))
    assert "its bound is also that of ordinary passes" in graph.stderr
    assert "ordinary passes" not in plain.stderr
    assert json.loads(plain.stdout)["results"] == json.loads(graph.stdout)["results"]


def test_profile_file(effref, tmp_path: Path) -> None:
    place = tmp_path / "machine.json"
    place.write_text(profile(name="other").to_json())
    assert "hardware other (level calibrated" in effref(*SMALL[:-1], str(place), "--seq", "8").stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--method resue", "did you mean 'reuse'"),
        ("--model conformer-n", "did you mean 'conformer-m'"),
        ("--model ./nothing.json", "no such file"),
        ("--seq 0", "length 0"),
        ("--seq -5", "length '-5'"),
        ("--seq ,", "length ''"),
        ("--heads 3 --d-model 32", "does not divide"),
        ("--layers 0", "--layers"),
        ("--batch -1", "--batch"),
        ("--batch 10000000000000000000000", "at most 1099511627776"),
        ("--d-ff 10000000000000000000000", "at most"),
        ("--energy=", "int8-dram"),
        (f"--output {'x' * 300}.json", "too long; give a shorter one"),
        (f"--output {'x' * 245}.json", "too long; give a shorter one"),  # its temporary neighbour's name is longer
        ("--set reuse.gruop=4", "did you mean 'group'"),
        ("--set reuse.group=0", "at least 1"),
        ("--set reuse.group=two", "whole number"),
        ("--set dense.x=1", "no parameters"),
        ("--method dense --set reuse.group=4", "not among the methods: dense"),
        ("--phase decod", "did you mean 'decode'"),
        ("--kv-len 64", "add --phase decode"),
        ("--steps 2", "add --phase decode"),
        ("--phase decode --seq 64", "--kv-len"),
        ("--phase decode --kv-len 0", "length 0"),
        ("--phase decode --steps 0", "--steps"),
        ("--phase decode --model whisper", "not causal"),
        ("--phase decode --model conformer-m --causal", "need all positions"),
        ("--phase decode --model smollm2-135m --no-causal", "not causal"),
        ("--hardware h10-sxm", "did you mean 'h100-sxm'"),
        ("--hardware local", "run 'effref calibrate'"),
        ("--hardware nothing.json", "cannot read"),
        ("--dtype float33", "float33"),
        ("--engine nunba", "did you mean 'numba'"),
        ("--engine numba --device gpu", "runs on the cpu"),
        ("--threads 0", "--threads"),
        ("--graph", "--graph is for GPUs and, on the CPU, for decoding with the engine 'numba'"),
        ("--graph --phase decode --steps 2", "--graph replays one pass"),
        ("--graph --phase decode --method local", "the op 'local_attention' has no instruction"),
        ("--hardware l4 --device cpu", "is a gpu"),
        ("--hardware ryzen-7840u --engine cupy", "is a cpu"),
        ("--sek 5", "--seq"),
        ("--format yaml", "yaml"),
        ("--hardware snapdragon-8-gen-3 --dtype float64 --model ./x/", "no such file"),
        ("extra", "extra"),
    ],
)
def test_hostile_requests_get_one_line(effref, arguments: str, said: str) -> None:
    assert said in error_of(effref("estimate", *arguments.split()))


def test_corrupted_profile(effref) -> None:
    from effref import profiles

    place = profiles.path("numba", 1, "float32")
    place.parent.mkdir(parents=True)
    for text in ("{", "[]", '{"profile_schema": 0}', '{"profile_schema": 1}', "\x00\xff"):
        place.write_bytes(text.encode("latin-1"))
        assert "effref calibrate" in error_of(effref("estimate", *TINY, "--seq", "8", "--threads", "1"))


def test_python_surface_checks_too() -> None:
    from refimpl.errors import ConfigError

    with pytest.raises(ConfigError, match="seq is 0"):
        package.estimate(seq=0)
    with pytest.raises(ConfigError, match="no method"):
        package.estimate(method=())
    with pytest.raises(ConfigError, match="threads is 0"):
        package.estimate(threads=0)
