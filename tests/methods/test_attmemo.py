"""What is true of memoised attention and of no other method; invariants by the numbers of the notes on the paper."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from counting import AuditedEngine

import costmodel
from refimpl import Runner, load_model
from refimpl.components import MEMO, SCORES
from refimpl.config import ModelConfig, Workload, override, preset
from refimpl.engines.numpy_engine import NumpyEngine
from refimpl.errors import ConfigError, DatabaseError, InputError
from refimpl.memo.building import Plan, about_of, build, key_mask
from refimpl.memo.database import Database, Writer
from refimpl.memo.memo import Memo
from refimpl.memo.training import Settings
from refimpl.methods.attmemo import AttMemo
from refimpl.methods.subject import Subject
from refimpl.parameters.attmemo import AttMemoParameters
from refimpl.recorder import tally
from refimpl.weights import Model
from refimpl.weights.layout import Weights

TRANSFERS = ["copy", pytest.param("map", marks=pytest.mark.skipif(sys.platform != "linux", reason="Linux maps pages"))]
T, KEPT = 8, 6
ENCODER = ModelConfig(
    name="bert", recipe="post-norm", layers=3, d_model=24, heads=4, d_ff=40, vocab=60, token_types=2,
    position="learned", max_positions=16, embedding_norm=True, final_norm=False,
)  # fmt: skip
DECODER = ModelConfig(
    name="llama", recipe="pre-norm", layers=3, d_model=24, heads=4, kv_heads=2, d_ff=40, gated=True, norm="rms",
    bias=False, causal=True, vocab=60, position="rotary", head=True,
)  # fmt: skip
CONFIGS = pytest.mark.parametrize("config", [ENCODER, DECODER], ids=["encoder", "decoder"])


def ids(count: int, seed: int = 0, length: int = T) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 60, (count, length))


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Model, Memo]]:
    """A model and a database of `ids(KEPT)`, by config and dtype; untrained, unless epochs are asked for."""
    made: dict[Any, tuple[Model, Memo]] = {}

    def make(config: ModelConfig, dtype: str = "float32", epochs: int = 0, index: str = "flat") -> tuple[Model, Memo]:
        key = config.name, dtype, epochs, index
        if key not in made:
            model, folder = load_model(config, dtype=dtype), tmp_path_factory.mktemp("memo") / "db"
            plan = Plan(Settings(epochs, batch=4), batch=4, index=index)
            build(folder, Subject(model, Runner(model, "numpy").engine, ids(KEPT)), plan, durable=False)
            made[key] = model, Memo(folder)
        return made[key]

    return make


def passed(model: Model, inputs: np.ndarray, engine: Any = "numpy", **params: Any) -> tuple[np.ndarray, AttMemo]:
    """The output of a pass, and the program, which knows what it found."""
    runner = Runner(model, engine)
    ready = runner.prepare("attmemo", params, inputs)
    program = AttMemo(model.config, ready.parameters)
    weighted = Runner(replace(model, weights=AttMemo.derive(model.weights, model.config, ready.parameters)), engine)
    return weighted(inputs, program).output, program


def dense(model: Model, inputs: np.ndarray, **given: Any) -> np.ndarray:
    return Runner(model, "numpy")(inputs, "dense", **given).output


def mixed() -> np.ndarray:
    """Sequences of the database, and others between them."""
    return np.concatenate([ids(KEPT)[[4]], ids(2, seed=9), ids(KEPT)[[1]], ids(1, seed=10)])


# --- 1. and 2.: exact attention -------------------------------------------------------------------------------------


@CONFIGS
def test_above_one_nothing_hits_and_the_output_is_that_of_dense(
    config: ModelConfig, kept: Callable[..., Any]
) -> None:  # fmt: skip
    model, memo = kept(config)
    output, program = passed(model, mixed(), tau=1.1, database=memo)
    assert program.found == {}
    assert output.tobytes() == dense(model, mixed()).tobytes()


@CONFIGS
def test_an_empty_database_is_exact_attention(config: ModelConfig, tmp_path: Path) -> None:
    model = load_model(config)
    with Writer(tmp_path / "db", asdict(about_of(Subject(model, None, ids(1)))), durable=False):
        pass
    output, program = passed(model, mixed(), tau=0, database=str(tmp_path / "db"))
    assert program.found == {}
    assert output.tobytes() == dense(model, mixed()).tobytes()


@CONFIGS
def test_all_too_far_is_exact_attention_after_the_search(config: ModelConfig, kept: Callable[..., Any]) -> None:
    model, memo = kept(config)
    others = ids(4, seed=9)
    output, program = passed(model, others, tau=1, database=memo)
    assert program.found == dict.fromkeys(range(3), (None,) * 4)
    assert output.tobytes() == dense(model, others).tobytes()


@CONFIGS
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_exact_records_give_the_output_of_dense_bit_for_bit(
    config: ModelConfig, dtype: str, transfer: str, kept: Callable[..., Any]
) -> None:
    model, memo = kept(config, dtype)
    order = [3, 0, 5, 3]
    output, program = passed(model, ids(KEPT)[order], tau=0.999, database=memo, transfer=transfer)
    assert program.found == {layer: tuple(order) for layer in range(3)}
    assert output.dtype == dtype
    assert output.tobytes() == dense(model, ids(KEPT)[order]).tobytes()


@CONFIGS
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_hits_and_misses_in_a_batch_are_both_exact(
    config: ModelConfig, transfer: str, kept: Callable[..., Any]
) -> None:  # fmt: skip
    model, memo = kept(config)
    output, program = passed(model, mixed(), tau=0.999, database=memo, transfer=transfer)
    assert program.found == dict.fromkeys(range(3), (4, None, None, 1, None))
    assert output.tobytes() == dense(model, mixed()).tobytes()


# --- 3. and 5.: thresholds ------------------------------------------------------------------------------------------


@CONFIGS
def test_at_zero_every_sequence_hits(config: ModelConfig, kept: Callable[..., Any]) -> None:
    model, memo = kept(config)
    output, program = passed(model, ids(5, seed=9), tau=0, database=memo)
    assert all(row is not None for rows in program.found.values() for row in rows)
    assert not np.array_equal(output, dense(model, ids(5, seed=9)))


@CONFIGS
def test_hits_do_not_increase_with_the_threshold(config: ModelConfig, kept: Callable[..., Any]) -> None:
    """In each layer alone: with earlier ones, what enters it depends on the threshold, too."""
    model, memo = kept(config, epochs=3)
    for layer in range(3):
        counts = []
        for tau in (0, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.1):
            _, program = passed(model, mixed(), tau=tau, database=memo, layers=[layer])
            counts.append(sum(row is not None for row in program.found.get(layer, (None,))))
        assert counts == sorted(counts, reverse=True)
        assert counts[0] == 5
        assert counts[-1] == 0


def test_the_distance_decides_not_its_square(kept: Callable[..., Any]) -> None:
    """The threshold between 1 - D and 1 - D^2 of a sequence misses."""
    model, memo = kept(ENCODER)
    seen: list[np.ndarray] = []

    class Watch(NumpyEngine):
        def nearest(self, x: Any, points: Any) -> Any:
            seen.append(np.array([np.linalg.norm(points - query, axis=1).min() for query in x]))
            return super().nearest(x, points)

    near = np.repeat(ids(KEPT)[:1], T, axis=0)
    np.fill_diagonal(near, (near.diagonal() + 1) % 60)  # one token is another
    passed(model, near, Watch(), tau=0.5, database=memo, layers=[0])
    b = int(np.argmin(np.abs(seen[-1] - 0.5)))
    one, distance = near[[b]], float(seen[-1][b])
    assert 0.05 < distance < 0.95
    for tau, hit in (((1 - distance) - 1e-4, True), (1 - distance**2 - 1e-4, False), (1 - distance + 1e-4, False)):
        _, program = passed(model, one, tau=tau, database=memo, layers=[0])
        assert (program.found[0][0] is not None) == hit


# --- 6. and 7.: what depends on what --------------------------------------------------------------------------------


@CONFIGS
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_misses_do_not_depend_on_hits(config: ModelConfig, transfer: str, kept: Callable[..., Any]) -> None:
    model, memo = kept(config)
    together, program = passed(model, mixed(), tau=0.999, database=memo, transfer=transfer)
    missed = [b for b, row in enumerate(program.found[0]) if row is None]
    alone, _ = passed(model, mixed()[missed], tau=0.999, database=memo, transfer=transfer)
    assert together[missed].tobytes() == alone.tobytes()


def changed(model: Model, rows: slice) -> Model:
    """The model with other values in these rows of the query, key and value maps of layer 1."""
    layers = list(model.weights.layers)
    qkv = layers[1].attention.qkv
    weight = qkv.weight.copy()
    weight[rows] *= 3
    other = Weights(**{**vars(qkv), "weight": weight})
    layers[1] = layers[1].but(attention=layers[1].attention.but(qkv=other))
    return replace(model, weights=model.weights.but(layers=layers))


@CONFIGS
def test_with_a_hit_only_the_values_are_computed(config: ModelConfig, kept: Callable[..., Any]) -> None:
    model, memo = kept(config)
    inputs, given = ids(KEPT)[:3], {"tau": 0.999, "database": memo}
    values = config.d_attention + config.d_kv
    output, _ = passed(model, inputs, **given)
    without = changed(model, slice(0, values))
    assert np.array_equal(passed(without, inputs, **given)[0], output)
    assert not np.array_equal(dense(without, inputs), output)
    assert not np.array_equal(passed(changed(model, slice(values, None)), inputs, **given)[0], output)


@CONFIGS
def test_a_layer_of_hits_runs_no_scores_and_no_softmax(config: ModelConfig, kept: Callable[..., Any]) -> None:
    model, memo = kept(config)
    runner = Runner(model, "numpy")
    given = {"tau": 0.999, "database": memo, "skip_layers": 1, "layers": [0, 2]}
    run = runner(ids(KEPT)[:3], runner.prepare("attmemo", given, ids(KEPT)[:3]))
    calls = [(call.component, call.op) for call in run.calls]
    assert calls.count((SCORES, "scores")) == 2  # layers 0 and 1
    assert [op for component, op in calls if component == MEMO] == ["max_pool", "linear", "nearest", "fetch"]


# --- 8.: how wrong a hit can be -------------------------------------------------------------------------------------


@CONFIGS
def test_the_error_of_a_hit_is_bounded_by_total_variation(config: ModelConfig, kept: Callable[..., Any]) -> None:
    """``|P V - P' V| <= 2 TV max |V|`` row by row, in the first layer."""
    model, memo = kept(config, "float64")
    found: dict[str, Any] = {}

    class Watch(NumpyEngine):
        def weighted_sum(self, weights: Any, v: Any, causal: bool = False) -> Any:
            return found.setdefault(self.what, (weights, v, super().weighted_sum(weights, v, causal)))[2]

    engine = Watch()
    engine.what = "dense"
    Runner(model, engine)(ids(4, seed=9), "dense")
    engine.what = "attmemo"
    passed(model, ids(4, seed=9), engine, tau=0, database=memo, hit_rate=1.0)
    (p, v, exact), (stored, same_v, output) = found["dense"], found["attmemo"]
    assert np.array_equal(v, same_v)
    variation = np.abs(p - stored).sum(-1) / 2  # (B, H, T)
    largest = np.repeat(np.abs(v).max(axis=(2, 3)), config.heads // config.kv_heads, axis=1)[..., None]
    error = np.abs(exact - output).max(-1)
    assert error.max() > 0
    assert np.all(error <= 2 * variation * largest + 1e-15)


# --- 9.: transfers, engines, counts ---------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="Linux maps pages")
@CONFIGS
@pytest.mark.parametrize("engine", ["numpy", "numba"])
@pytest.mark.parametrize("tau", [0, 0.9, 0.999])
def test_mapped_and_copied_maps_give_the_same_bits(
    config: ModelConfig, engine: str, tau: float, kept: Callable[..., Any]
) -> None:
    model, memo = kept(config, epochs=3)
    copied, program = passed(model, mixed(), engine, tau=tau, database=memo, transfer="copy")
    mapped, again = passed(model, mixed(), engine, tau=tau, database=memo, transfer="map")
    assert program.found == again.found
    assert copied.tobytes() == mapped.tobytes()


@CONFIGS
def test_the_numba_engine_finds_the_same_and_is_close(config: ModelConfig, kept: Callable[..., Any]) -> None:
    model, memo = kept(config)
    truth, program = passed(model, mixed(), tau=0.999, database=memo)
    output, fast = passed(model, mixed(), "numba", tau=0.999, database=memo)
    assert fast.found == program.found
    np.testing.assert_allclose(output, truth, rtol=0, atol=2e-5)


@CONFIGS
@pytest.mark.parametrize("transfer", TRANSFERS)
@pytest.mark.parametrize("index", ["flat", "hnsw"])
@pytest.mark.parametrize("tau", [0, 0.9, 0.999, 1])
def test_the_closed_form_counts_measured_hits(
    config: ModelConfig, transfer: str, index: str, tau: float, kept: Callable[..., Any]
) -> None:
    """Op by op with all sizes; the hit rates are those that preparing found on the inputs."""
    model, memo = kept(config, epochs=3, index="hnsw")
    inputs = mixed()
    given = {"tau": tau, "database": memo, "transfer": transfer, "index": index}
    ready = Runner(model, "numpy").prepare("attmemo", given, inputs)
    engine = AuditedEngine()
    run = Runner(model, engine)(inputs, ready)
    parameters = ready.parameters
    if index == "hnsw":
        (compared,) = {dict(call.sizes)["compared"] for call in run.calls if call.op == "search_graph"}
        assert compared % len(inputs) == 0
        parameters = replace(parameters, compared=compared // len(inputs))
    work = Workload(seq=T, batch=len(inputs))
    estimate = costmodel.estimate("attmemo", config, work, parameters)
    assert tally(run.calls) == estimate.tally()
    assert engine.audited == len(run.calls)
    rates = parameters.hit_rate
    assert {0: rates == (1, 1, 1), 0.9: True, 0.999: rates == (0.4, 0.4, 0.4), 1: max(rates) <= 0.4}[tau]


def test_the_closed_form_takes_arrays_of_batches(kept: Callable[..., Any]) -> None:
    """Where a rate rounds to no hit and to some in one array."""
    _, memo = kept(ENCODER)
    given = {"tau": 0.9, "database": memo, "hit_rate": (0.2, 0.7, 1.0)}
    batches = np.array([1, 2, 3, 8])
    many = costmodel.estimate("attmemo", ENCODER, Workload(seq=T, batch=batches), given)
    for i, batch in enumerate(batches.tolist()):
        one = costmodel.estimate("attmemo", ENCODER, Workload(seq=T, batch=batch), given)
        for figure in ("matmul_flops", "vector_flops", "bytes_read", "bytes_written"):
            assert np.broadcast_to(getattr(many.total, figure), 4)[i] == getattr(one.total, figure), (batch, figure)
        assert np.broadcast_to(many.peak_bytes, 4)[i] == one.peak_bytes


# --- the cost table of the notes on the paper -----------------------------------------------------------------------

BERT = override(preset("minilm-l6"), layers=1, d_model=768, heads=12, d_ff=3072)


def of_attention(params: Any, batch: int, length: int) -> tuple[int, dict[str, Any]]:
    """Matrix FLOPs of everything but embedding and search, and the memo component."""
    estimate = costmodel.estimate("attmemo", BERT, Workload(seq=length, batch=batch), params)
    memo = estimate.by_component().get(MEMO)
    return estimate.total.matmul_flops - (memo.matmul_flops if memo else 0), memo


@pytest.mark.parametrize("length", [64, 128, 256, 512])
def test_flops_saved_by_a_hit_are_those_of_the_table(length: int) -> None:
    """0.157, 0.327, 0.705 and 1.611 GFLOP a sequence: 4 T d^2 + 2 T^2 d; with any share of hits, as many times."""
    exact, _ = of_attention({"tau": 1.1}, 8, length)
    one = 4 * length * 768**2 + 2 * length**2 * 768
    assert round(one / 1e9, 3) == {64: 0.157, 128: 0.327, 256: 0.705, 512: 1.611}[length]
    for hits in range(9):
        assert exact - of_attention({"hit_rate": hits / 8}, 8, length)[0] == hits * one


@pytest.mark.parametrize("length", [128, 256, 512])
def test_the_lookup_costs_what_the_table_says(length: int) -> None:
    """64 B T d matrix FLOPs, 384 B n vector ones and the reduction to one of n, and 32 T d weights once a call."""
    B, n = 8, 8
    _, memo = of_attention({"hit_rate": 0.0}, B, length)
    assert memo.matmul_flops == 64 * B * length * 768
    assert memo.vector_flops == B * (3 * length * 768 // 4 + 128 + 384 * n + n + 1)
    assert memo.weight_bytes == 4 * (32 * length * 768 + 128)
    assert 128 * (length // 2) * 384 == {128: 128, 256: 256, 512: 512}[length] * 24_576  # 12.6, 25.2, 50.3 MB as fp32


def test_traffic_of_maps_is_that_of_the_table() -> None:
    """A hit spares the maps of scores and softmax, 3 H T^2 elements; copied, it adds 2 H T^2; mapped, none."""
    B, length = 8, 128
    maps = 12 * length**2 * 4

    def moved(params: Any) -> int:
        estimate = costmodel.estimate("attmemo", BERT, Workload(seq=length, batch=B), params)
        parts = estimate.by_component()
        return sum(parts[name].bytes_moved for name in ("scores", "softmax", "weighted-sum") if name in parts) + sum(
            op.cost(4).bytes_moved for op in estimate.ops if op.name in ("fetch", "scatter")
        )

    none = moved({"tau": 1.1})
    queries_and_keys = 2 * length * 768 * 4
    for hits in range(1, 9):
        misses = B - hits
        mapped = none - hits * (3 * maps + queries_and_keys) + 2 * misses * maps
        assert moved({"hit_rate": hits / B, "transfer": "map"}) == mapped
        assert moved({"hit_rate": hits / B}) == mapped + 2 * hits * maps


# --- what is refused ------------------------------------------------------------------------------------------------


def test_what_does_not_fit_the_database_is_refused(kept: Callable[..., Any]) -> None:
    model, memo = kept(ENCODER)
    given = {"tau": 0.9, "database": memo}
    with pytest.raises(ConfigError, match="holds maps of 8 positions; the input has 5"):
        passed(model, ids(2, length=5), **given)
    with pytest.raises(ConfigError, match="are not causal; this pass is causal"):
        Runner(model, "numpy")(ids(2), "attmemo", given, causal=True)
    with pytest.raises(ConfigError, match="a stored map has its own mask"):
        Runner(model, "numpy")(ids(2), "attmemo", given, mask=np.ones((1, 1, 1, T), bool))
    with pytest.raises(DatabaseError, match=r"was built on bert \(layers 3\), not on bert as it is \(layers 4\)"):
        passed(load_model(replace(ENCODER, layers=4)), ids(2), **given)
    with pytest.raises(DatabaseError, match=r"\(weights "):
        passed(load_model(ENCODER, seed=5), ids(2), tau=0.9, database=str(memo.folder))


def test_caches_relative_positions_and_streams_are_refused(kept: Callable[..., Any]) -> None:
    model, memo = kept(DECODER)
    runner = Runner(model, "numpy")
    given = {"tau": 0.9, "database": memo}
    with pytest.raises(ConfigError, match="attmemo keeps no keys for a cache"):
        runner(ids(2), "attmemo", given, cache=runner.new_cache(T, "attmemo", given, 2))
    for name, message in (("conformer-m", "has relative positions"), ("emformer-rnnt-base", "streams over a cache")):
        with pytest.raises(ConfigError, match=message):
            costmodel.estimate("attmemo", preset(name), Workload(seq=64))
        costmodel.estimate("attmemo", preset(name), Workload(seq=64), {"tau": 1.1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tau": 3}, "tau=3; it must be a number from 0 to 2"),
        ({"database": 5}, "database=5; it must be the folder"),
        ({"index": "ivf"}, "index='ivf'; it must be one of 'flat', 'hnsw'"),
        ({"transfer": "move"}, "'copy', 'map'"),
        ({"layers": [1, 1]}, "a list of different layers"),
        ({"layers": [7]}, "layers names 7; bert has the layers 0 to 2"),
        ({"hit_rate": 1.5}, "hit_rate=1.5"),
        ({"hit_rate": [0.5]}, "hit_rate has 1 values; bert has 3 layers"),
        ({"skip_layers": -1}, "skip_layers=-1"),
    ],
)
def test_parameters_are_checked(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")):
        costmodel.estimate("attmemo", ENCODER, Workload(seq=T), given)


def test_without_inputs_there_is_nothing_to_look_up_in() -> None:
    ready = Runner(load_model(ENCODER), "numpy").prepare("attmemo")
    with pytest.raises(ConfigError, match="has no database yet"):
        ready.program()


def test_a_selection_needs_a_profile(kept: Callable[..., Any]) -> None:
    model, memo = kept(ENCODER)
    with pytest.raises(ConfigError, match="run 'effref memo profile --taus"):
        Runner(model, "numpy").prepare("attmemo", {"database": memo, "select": "measured"}, ids(2))


def test_a_selection_takes_the_layers_that_pay(tmp_path: Path) -> None:
    model = load_model(ENCODER)
    runner = Runner(model, "numpy")
    build(tmp_path / "db", Subject(model, runner.engine, ids(3)), Plan(Settings(0)), durable=False)
    gains = ((0, 0.5, -1, 2), (1, 0.5, 3, 0.4), (2, 0.5, 1, -1), (3, 0.0, 3, 3))  # 0.4 of 10 is within the margin
    rows = [
        {"layer": i, "hit_rate": hits, "dense_s": 10, "benefit_s": b, "predicted_benefit_s": p}
        for i, hits, b, p in gains
    ]  # of layer 3 nothing was found
    at_tau = [{"tau": 0.9, "layers": rows}, {"tau": 0.0, "layers": [{**row, "benefit_s": -1} for row in rows]}]
    with Writer(tmp_path / "db", durable=False) as writer:
        writer.note("profile", {"thresholds": at_tau})
        writer.commit()
    for select, tau, layers in (
        ("measured", 0.9, (1, 2)), ("model", 0.9, (0,)), ("all", 0.9, None), ("auto", 0.9, (1, 2)), ("auto", 0.5, None),
    ):  # fmt: skip
        given = {"database": str(tmp_path / "db"), "select": select, "tau": tau}
        assert runner.prepare("attmemo", given, ids(3)).parameters.layers == layers
    with pytest.raises(ConfigError, match=r"at tau=0\.5: run 'effref memo profile --taus 0\.5'"):
        runner.prepare("attmemo", {"database": str(tmp_path / "db"), "select": "measured", "tau": 0.5}, ids(3))
    nothing_pays = {"database": str(tmp_path / "db"), "tau": 0.0}
    output = runner(ids(3), runner.prepare("attmemo", nothing_pays, ids(3))).output
    assert output.tobytes() == dense(model, ids(3)).tobytes()


# --- databases of the run's own inputs ------------------------------------------------------------------------------


@CONFIGS
def test_without_a_database_one_is_built_of_the_own_inputs(config: ModelConfig) -> None:
    model = load_model(config)
    told: list[str] = []
    ready = Runner(model, "numpy").prepare("attmemo", {"epochs": 2}, ids(4), lambda text, _: told.append(text))
    assert "building a database of the 4 sequences that it will run on" in told[0]
    parameters: AttMemoParameters = ready.parameters
    assert parameters.own_inputs
    assert parameters.hit_rate == (1, 1, 1)
    assert not parameters.database.folder.exists()
    output = Runner(model, "numpy")(ids(4), ready).output
    assert output.tobytes() == dense(model, ids(4)).tobytes()


def test_each_length_has_its_own_database() -> None:
    model = load_model(ENCODER)
    runner = Runner(model, "numpy")
    for length in (8, 5, 8):
        assert runner(ids(2, length=length), "attmemo").output.shape[1] == length


# --- building -------------------------------------------------------------------------------------------------------


def test_a_stopped_build_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    """Stopped at every commit in turn."""
    model = load_model(ENCODER)
    engine, plan = Runner(model, "numpy").engine, Plan(Settings(2, batch=3), batch=2)

    class StopError(Exception):
        pass

    def stopping(after: int) -> Callable[[str, float], None]:
        left = [after]

        def progress(message: str, fraction: float) -> None:
            left[0] -= 1
            if not left[0]:
                raise StopError

        return progress

    straight = Subject(model, engine, ids(5))
    build(tmp_path / "straight", straight, plan, durable=False)
    finished, stops = False, 0
    while not finished:
        try:
            build(tmp_path / "db", replace(straight, progress=stopping(stops % 4 + 1)), plan, durable=False)
            finished = True
        except StopError:
            stops += 1
            assert stops < 60
    assert stops > 4
    with Database(tmp_path / "straight", True) as one, Database(tmp_path / "db", True) as other:
        for layer in range(3):
            for name in (f"training-{layer}", f"index-{layer}"):
                assert one.file(name) == other.file(name)
            for name in (f"maps-{layer}", f"pooled-{layer}"):
                assert one.records(name).array.tobytes() == other.records(name).array.tobytes()


def test_a_build_with_other_heads_trains_anew(tmp_path: Path) -> None:
    model = load_model(ENCODER)
    subject = Subject(model, Runner(model, "numpy").engine, ids(5))
    first = Plan(Settings(2), heads="first")
    build(tmp_path / "db", subject, Plan(Settings(2)), durable=False)
    build(tmp_path / "db", subject, first, durable=False)
    build(tmp_path / "fresh", subject, first, durable=False)
    with Database(tmp_path / "db", True) as one, Database(tmp_path / "fresh", True) as other:
        assert one.notes == other.notes  # the losses are those of the maps that were compared
        for layer in range(3):
            assert one.file(f"training-{layer}") == other.file(f"training-{layer}")


def test_a_build_with_other_features_forgets_what_was_found_with_those_before(tmp_path: Path) -> None:
    """The graph of their neighbours and the profile; both stay where the features do."""
    model = load_model(ENCODER)
    subject = Subject(model, Runner(model, "numpy").engine, ids(5))

    def rebuilt(seed: int) -> Memo:
        build(tmp_path, subject, Plan(Settings(1, seed=seed)), durable=False)
        return Memo(tmp_path)

    build(tmp_path, subject, Plan(Settings(1), index="hnsw"), durable=False)
    with Writer(tmp_path) as writer:
        writer.note("profile", {"thresholds": []})
        writer.commit()
    same = rebuilt(seed=0)
    assert same.profile
    assert all(f"graph-{layer}" in same.database for layer in range(3))
    other = rebuilt(seed=1)
    assert not other.profile
    assert not any(f"graph-{layer}" in other.database for layer in range(3))
    for layer in range(3):
        points = other.tables(layer).points
        np.testing.assert_array_equal(other.graph(layer).search(points)[1], range(5))


def test_a_build_with_other_inputs_or_without_any_is_refused(tmp_path: Path) -> None:
    model = load_model(ENCODER)
    engine = Runner(model, "numpy").engine
    build(tmp_path / "db", Subject(model, engine, ids(2)), Plan(Settings(0)), durable=False)
    with pytest.raises(DatabaseError, match="begun with other inputs"):
        build(tmp_path / "db", Subject(model, engine, ids(2, seed=3)), durable=False)
    for inputs in (None, ids(0)):
        with pytest.raises(InputError, match="give at least one sequence"):
            build(tmp_path / "none", Subject(model, engine, inputs), durable=False)
    relative = load_model(override(preset("conformer-m"), layers=1))
    with pytest.raises(ConfigError, match="has relative positions"):
        build(tmp_path / "none", Subject(relative, engine, np.zeros((1, 32, 80), np.float32)), durable=False)


def test_a_database_of_padded_sequences_keeps_masked_maps(tmp_path: Path) -> None:
    model = load_model(ENCODER)
    lengths = [8, 3, 5]
    subject = Subject(model, Runner(model, "numpy").engine, ids(3))
    build(tmp_path / "db", subject, Plan(Settings(1), batch=2), lengths=lengths, durable=False)
    memo = Memo(tmp_path / "db")
    for sequence, length in enumerate(lengths):
        kept = memo.records(0).array[sequence]
        assert np.all(kept[:, :, length:] == 0)
        np.testing.assert_allclose(kept.sum(-1), 1, rtol=1e-6)
    mask = key_mask(lengths, T)
    exact = dense(model, ids(3), mask=mask)
    given = {"tau": 0.999, "database": memo, "padding": "include"}
    assert Runner(model, "numpy")(ids(3), "attmemo", given, mask=mask).output.tobytes() == exact.tobytes()


def test_misses_keep_their_own_rows_of_the_mask(kept: Callable[..., Any]) -> None:
    """Hits have the maps that they were stored with, here without a mask."""
    model, memo = kept(ENCODER)
    mask = key_mask([8, 3, 5, 8, 4], T)
    given = {"tau": 0.999, "database": memo, "padding": "include"}
    output = Runner(model, "numpy")(mixed(), "attmemo", given, mask=mask).output
    assert output.tobytes() == dense(model, mixed(), mask=mask).tobytes()
