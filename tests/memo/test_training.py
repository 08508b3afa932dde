"""The embedding and its training: against finite differences, plain loops, and itself when it was stopped."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from memo_data import clusters

from refimpl.errors import ConfigError, DatabaseError, InputError
from refimpl.memo import embedding
from refimpl.memo.embedding import EPS, Network, inputs_of, max_pool, pooled
from refimpl.memo.similarity import pair_distances
from refimpl.memo.training import Settings, Training

RNG = np.random.default_rng(0)


def small_network(seed: int = 0, inputs: int = 12, width: int = 5) -> Network:
    """In float64, with norms that are not neutral."""
    rng = np.random.default_rng(seed)
    network = Network.random(inputs, rng, width, "float64")
    for group in (network.weights, network.statistics):
        for array in group.values():
            array += 0.3 * rng.random(array.shape)
    return network


@pytest.mark.parametrize("shape", [(2, 4, 6), (1, 5, 7), (3, 2, 2), (2, 1, 4), (0, 4, 4)])
def test_max_pool_takes_the_largest_of_four(shape: tuple[int, ...]) -> None:
    x = RNG.standard_normal(shape)
    batch, rows, columns = shape[0], shape[1] // 2, shape[2] // 2
    expected = np.empty((batch, rows, columns))
    for b, i, j in np.ndindex(batch, rows, columns):
        expected[b, i, j] = x[b, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max()
    assert np.array_equal(max_pool(x), expected)
    assert pooled(x).shape == (batch, inputs_of(*shape[1:]))


def test_the_width_of_the_first_map_is_that_of_the_published_code() -> None:
    assert [inputs_of(length, 768) for length in (128, 256, 512)] == [24_576, 49_152, 98_304]


def test_the_folded_map_equals_the_network_in_evaluation_mode() -> None:
    for seed in range(5):
        network = small_network(seed)
        x = RNG.standard_normal((7, 12))
        weight, bias = network.fold()
        assert weight.shape == (5, 12)
        np.testing.assert_allclose(x @ weight.T + bias, network.features(x), rtol=0, atol=1e-13)


def test_the_folded_map_is_as_exact_as_the_network_in_float32() -> None:
    """Error against float64 at most twice that of the layers one by one."""
    exact = small_network(1, 200, 16)
    narrow = Network(*({k: v.astype(np.float32) for k, v in group.items()} for group in vars(exact).values()))
    exact = Network(*({k: v.astype(np.float64) for k, v in group.items()} for group in vars(narrow).values()))
    x = RNG.standard_normal((9, 200)).astype(np.float32)
    truth, plain = exact.features(x.astype(np.float64)), narrow.features(x)
    weight, bias = narrow.fold()
    assert weight.dtype == np.float32
    assert np.abs(x @ weight.T + bias - truth).max() <= 2 * np.abs(plain - truth).max() + 1e-7


def test_the_loss_equals_plain_loops() -> None:
    """Both norms with the statistics of the batch, all pairs, SmoothL1 of distances that are not squared."""
    network, x = small_network(), RNG.standard_normal((4, 12))
    targets = np.array([0.1, 0.5, 3.0, 0.2, 9.0, 0.4])
    w = network.weights
    h = (x - x.mean()) / np.sqrt(x.var() + EPS) * w["norm.weight"] + w["norm.bias"]
    h = h @ w["first.weight"].T + w["first.bias"]
    h = (h - h.mean(0)) / np.sqrt(h.var(0) + EPS) * w["inner.weight"] + w["inner.bias"]
    f = h @ w["second.weight"].T + w["second.bias"]
    losses = []
    for (i, j), target in zip(combinations(range(4), 2), targets, strict=True):
        error = abs(np.linalg.norm(f[i] - f[j]) - target)
        losses.append(error**2 / 2 if error < 1 else error - 0.5)
    assert {error > 1 for error in losses} == {True, False}  # both parts of SmoothL1
    loss, _, batch = network.loss(x, targets)
    assert loss == pytest.approx(np.mean(losses), rel=1e-12)
    assert batch["norm.variance"] == pytest.approx(x.var(ddof=1))


@pytest.mark.parametrize("name", list(small_network().weights))
def test_gradients_equal_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every element of every trained array, in float64; a large epsilon, without which the inner norm takes out the
    scale of the first one."""
    monkeypatch.setattr(embedding, "EPS", 0.5)
    network, x = small_network(), RNG.standard_normal((4, 12))
    targets = np.array([0.1, 0.5, 3.0, 0.2, 9.0, 0.4])
    _, gradient, _ = network.loss(x, targets)
    array, step = network.weights[name], 1e-6
    assert gradient[name].shape == array.shape
    numeric = np.empty_like(array)
    for index in np.ndindex(array.shape):
        kept = array[index]
        losses = []
        for moved in (kept + step, kept - step):
            array[index] = moved
            losses.append(network.loss(x, targets)[0])
        array[index] = kept
        numeric[index] = (losses[0] - losses[1]) / (2 * step)
    np.testing.assert_allclose(gradient[name], numeric, rtol=1e-6, atol=1e-9)
    if name.endswith("weight"):  # the norm behind, or the difference, takes every bias out
        assert np.abs(numeric).max() > 1e-4


def test_equal_sequences_have_a_finite_gradient() -> None:
    x = np.repeat(RNG.standard_normal((1, 12)), 3, axis=0)
    loss, gradient, _ = small_network().loss(x, np.zeros(3))
    assert loss == 0.0
    assert all(np.isfinite(array).all() for array in gradient.values())


def test_running_statistics_follow_the_batches() -> None:
    network, x = small_network(), 3 + 2 * RNG.standard_normal((64, 12))
    for _ in range(300):
        network.follow(network.loss(x, np.zeros(64 * 63 // 2))[2])
    assert network.statistics["norm.mean"] == pytest.approx(x.mean())
    assert network.statistics["norm.variance"] == pytest.approx(x.var(ddof=1))


def test_training_finds_distances_that_it_has_not_seen() -> None:
    """Hidden states of four kinds whose maps are alike within a kind: held-out pairs are told apart."""
    hidden, maps, kinds = clusters(48, seed=1)
    seen, held = slice(0, 36), slice(36, 48)
    training = Training.new(inputs_of(*hidden.shape[1:]), Settings(epochs=20, batch=12, seed=3))
    while not training.is_done:
        training.epoch(pooled(hidden[seen]), maps[seen])
    assert training.losses[-1] < 0.2 * training.losses[0]
    weight, bias = training.network.fold()
    features = pooled(hidden[held]) @ weight.T + bias
    i, j = np.triu_indices(12, 1)
    predicted = np.linalg.norm(features[i] - features[j], axis=1)
    targets = pair_distances(maps[held])
    same = kinds[held][i] == kinds[held][j]
    assert predicted[same].max() < predicted[~same].min()
    assert np.abs(predicted - targets).mean() < 0.15


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_training_goes_on_bit_for_bit(stop: int) -> None:
    hidden, maps, _ = clusters(20)
    settings = Settings(epochs=5, batch=6, seed=7)
    straight = Training.new(inputs_of(*hidden.shape[1:]), settings)
    stopped = Training.new(inputs_of(*hidden.shape[1:]), settings)
    for _ in range(5):
        straight.epoch(pooled(hidden), maps)
    for _ in range(stop):
        stopped.epoch(pooled(hidden), maps)
    resumed = Training.from_bytes(stopped.to_bytes())
    while not resumed.is_done:
        resumed.epoch(pooled(hidden), maps)
    assert resumed.to_bytes() == straight.to_bytes()
    assert resumed.losses == straight.losses


def test_the_seed_decides() -> None:
    hidden, maps, _ = clusters(12)

    def trained(seed: int) -> bytes:
        training = Training.new(inputs_of(*hidden.shape[1:]), Settings(1, 6, seed=seed))
        training.epoch(pooled(hidden), maps)
        return training.to_bytes()

    assert trained(1) == trained(1) != trained(2)


def test_progress_ends_at_one() -> None:
    hidden, maps, _ = clusters(13)
    told: list[float] = []
    Training.new(inputs_of(*hidden.shape[1:]), Settings(batch=6)).epoch(pooled(hidden), maps, report=told.append)
    assert told == sorted(told)
    assert 12 / 13 <= told[-1] <= 1.0


def test_one_sequence_is_no_pair() -> None:
    hidden, maps, _ = clusters(1)
    with pytest.raises(InputError, match="at least 2"):
        Training.new(inputs_of(*hidden.shape[1:]), Settings()).epoch(pooled(hidden), maps)


@pytest.mark.parametrize("part", [0, 0.3, 0.99])
def test_a_damaged_checkpoint_is_refused(part: float) -> None:
    data = Training.new(12, Settings()).to_bytes()
    with pytest.raises(DatabaseError, match="damaged"):
        Training.from_bytes(data[: int(part * len(data))])
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 1
    with pytest.raises(DatabaseError, match="damaged"):
        Training.from_bytes(bytes(flipped))


@pytest.mark.parametrize("settings", [{"batch": 1}, {"epochs": -1}, {"seed": -1}])
def test_settings_without_a_pair_or_a_number_are_refused(settings: dict[str, int]) -> None:
    """A batch of one has no pair: its loss would be the mean of nothing."""
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=f"{name}={value}; it must be a whole number"):
        Settings(**settings)
