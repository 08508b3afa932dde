"""Training of thresholds: its steps, its order, what it reaches, and that it goes on where it stopped."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gradients import assert_gradient

from refimpl import Model, forward, load_model
from refimpl.config import override, preset
from refimpl.errors import ConfigError, EffrefError, InputError
from refimpl.inputs import random_inputs, sample
from refimpl.training import checkpoint
from refimpl.training.comparison import UNTRAINED, evaluate
from refimpl.training.filter import Rule
from refimpl.training.passes import TrainableModel
from refimpl.training.samples import Samples, read_samples, with_targets
from refimpl.training.thresholds import (
    NEAR,
    Recipe,
    State,
    adam,
    begin,
    global_threshold,
    gradient_of,
    kept_of_heads,
    order,
    quantile_thresholds,
    train,
)

CONFIG = override(preset("smollm2-135m"), layers=2, d_model=16, heads=4, kv_heads=2, d_ff=12, vocab=40)
RECIPE = Recipe(target_kept=0.3, rate=0.1, weight=50.0)


def silent(message: str, fraction: float) -> None: ...


@cache
def tiny() -> Model:
    model = load_model(CONFIG, weights="random", seed=3)
    for layer in model.weights.layers:
        layer.attention.qkv.weight *= 4.0
    return model


@cache
def tiny_samples() -> Samples:
    return with_targets(tiny(), random_inputs(CONFIG, 13, 5))


def trained(steps: int, recipe: Recipe = RECIPE, state: State | None = None) -> State:
    model = TrainableModel(tiny(), recipe.rule)
    state = begin(model, tiny_samples(), recipe) if state is None else state
    *_, last = train(model, tiny_samples(), recipe, state, steps, silent)
    return last


# --- steps ----------------------------------------------------------------------------------------------------------


def test_gradient_of_the_loss_equals_central_differences() -> None:
    """Task loss and the pull towards the kept share together, with the soft mask in float64."""
    model = load_model(CONFIG, weights="random", seed=3, dtype="float64")
    recipe = replace(RECIPE, rule=Rule("exact", stage2="float", mask="soft", temperature=0.7))
    trainable, samples = TrainableModel(model, recipe.rule), tiny_samples()[:2]
    thresholds = np.random.default_rng(0).uniform(0.1, 0.5, (2, 4))
    gradient, loss, kept = gradient_of(trainable, samples, thresholds, recipe)

    def total(thresholds: Any) -> float:
        _, task, kept = gradient_of(trainable, samples, thresholds, recipe)
        return task + 50.0 * (kept - 0.3) ** 2

    assert_gradient(gradient, total, thresholds)
    assert total(thresholds) == loss + 50.0 * (kept - 0.3) ** 2


def test_adam_equals_pytorch() -> None:
    """Three steps of torch.optim.Adam (lr 0.1), PyTorch 2.13, float64; then the projection onto 0."""
    state = State(np.array([[1.0, 0.15, 3.0]]), np.zeros((1, 3)), np.zeros((1, 3)))
    for gradient in ([0.5, 1.0, -2e-3], [-0.25, 2.0, -1e-3], [1.0, 3.0, 4e-3]):
        state = replace(adam(state, np.array([gradient]), 0.1), losses=(*state.losses, 0.0))
    np.testing.assert_allclose(state.thresholds[0, [0, 2]], [0.80755513967709, 3.1725812494899], rtol=1e-12)
    assert state.thresholds[0, 1] == 0.0


def test_every_window_comes_once_in_a_round() -> None:
    recipe = replace(RECIPE, batch=2, seed=4)
    seen = [window for step in range(15) for window in order(5, step, recipe)]
    rounds = np.reshape(seen, (6, 5))
    assert (np.sort(rounds, axis=1) == np.arange(5)).all()
    assert len({tuple(one) for one in rounds.tolist()}) > 1
    assert seen != [window for step in range(15) for window in order(5, step, replace(recipe, seed=5))]


def test_progress_is_told_of_every_step() -> None:
    told: list[tuple[str, float]] = []
    model = TrainableModel(tiny(), RECIPE.rule)
    state = begin(model, tiny_samples(), RECIPE)
    list(train(model, tiny_samples(), RECIPE, state, 2, lambda *said: told.append(said)))
    assert [fraction for _, fraction in told] == [0.5, 1.0]
    assert told[0][0].startswith("step 1 of 2, loss ")


# --- what it reaches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["quantile", "global"])
def test_training_lowers_the_loss_at_the_kept_share_asked_for(start: Any) -> None:
    """Without next tokens: the output of exact attention is aimed at, so that there is something to gain."""
    config = override(preset("minilm-l6"), layers=2, d_model=16, heads=4, d_ff=12, vocab=40)
    source = load_model(config, weights="random", seed=3)
    for layer in source.weights.layers:
        queries_and_keys = layer.attention.qkv.weight[:32]
        queries_and_keys *= 0.43 / queries_and_keys.std()  # scores of a spread of a few units
        layer.attention.output.weight *= np.geomspace(0.1, 10, 4).repeat(4).astype(np.float32)  # heads unlike in weight
    samples = with_targets(source, random_inputs(config, 16, 6))
    recipe = replace(RECIPE, start=start, rate=0.05, weight=100.0)
    model = TrainableModel(source, recipe.rule)
    state = begin(model, samples, recipe)
    before = evaluate(model, samples, state.thresholds)
    assert before.kept == pytest.approx(0.3, abs=0.05)
    *_, state = train(model, samples, recipe, state, 60, silent)
    after = evaluate(model, samples, state.thresholds)
    assert after.kept == pytest.approx(0.3, abs=0.02)
    assert after.loss < 0.8 * before.loss
    assert state.thresholds.min() >= 0.0
    for name, find in UNTRAINED.items():
        other = evaluate(model, samples, find(model, samples, samples, after.kept))
        assert other.kept == pytest.approx(after.kept, abs=2 * NEAR + 0.01), name
        assert after.loss < other.loss, name


def test_weight_decides_between_share_and_loss() -> None:
    loose, tight = (trained(25, replace(RECIPE, weight=weight)) for weight in (0.0, 1e4))
    model = TrainableModel(tiny(), RECIPE.rule)
    shares = [kept_of_heads(model, tiny_samples(), state.thresholds).mean() for state in (loose, tight)]
    assert abs(shares[1] - 0.3) < 0.02
    assert abs(shares[1] - 0.3) < abs(shares[0] - 0.3)


def test_quantiles_keep_their_share_in_every_head() -> None:
    model, samples = TrainableModel(tiny(), Rule()), tiny_samples()
    thresholds = quantile_thresholds(model, samples, 0.4)
    kept = kept_of_heads(model, samples, thresholds)
    pairs = 5 * 12 * 13 / 2
    assert np.abs(kept - 0.4).max() <= 2 / pairs + 0.01  # ties of integer estimates
    assert np.unique(thresholds).size == 8


def test_global_threshold_keeps_its_share_in_the_mean() -> None:
    model, samples = TrainableModel(tiny(), Rule()), tiny_samples()
    thresholds = global_threshold(model, samples, 0.4)
    assert np.unique(thresholds).size == 1
    assert kept_of_heads(model, samples, thresholds).mean() == pytest.approx(0.4, abs=0.01)
    assert global_threshold(model, samples, 1.0).max() == 100.0


def test_evaluate_agrees_with_forward() -> None:
    """Everything kept and nothing quantised: the loss is that of the dense logits, the cosine 1."""
    from refimpl.language import perplexity

    everything = np.full((2, 4), math.inf)
    samples = tiny_samples()
    found = evaluate(TrainableModel(tiny(), Rule("exact", stage2="float")), samples, everything)
    expected = perplexity(forward(tiny(), samples.inputs, record=False).output, samples.targets)
    assert found.perplexity == pytest.approx(expected, rel=1e-5)
    assert found.cosine is None
    config = override(preset("minilm-l6"), layers=1, d_model=16, heads=4, d_ff=12, vocab=40)
    model = load_model(config, weights="random")
    samples = with_targets(model, random_inputs(config, 7, 3))
    exact = forward(model, samples.inputs, record=False).output
    np.testing.assert_allclose(samples.targets, exact, rtol=1e-4, atol=1e-5)
    found = evaluate(TrainableModel(model, Rule("exact", stage2="float")), samples, everything[:1])
    assert (found.kept, found.perplexity) == (1.0, None)
    assert found.cosine == pytest.approx(1.0, abs=1e-6)
    assert found.loss < 1e-10


# --- going on -------------------------------------------------------------------------------------------------------


def saved(state: State, key: str, path: Path) -> None:
    with path.open("wb") as file:
        checkpoint.write(file, state, key)


def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    key = checkpoint.key_of(tiny(), tiny_samples(), RECIPE)
    saved(trained(4), key, tmp_path / "c.npz")
    resumed = trained(9, state=checkpoint.read(tmp_path / "c.npz", key))
    whole = trained(9)
    for name in checkpoint.FIELDS:
        np.testing.assert_array_equal(getattr(resumed, name), getattr(whole, name))
    assert not np.array_equal(whole.thresholds, trained(4).thresholds)
    assert not np.array_equal(whole.thresholds, trained(9, replace(RECIPE, seed=1)).thresholds)


def test_another_training_is_refused(tmp_path: Path) -> None:
    model, samples = tiny(), tiny_samples()
    key = checkpoint.key_of(model, samples, RECIPE)
    saved(trained(1), key, tmp_path / "c.npz")
    others = [
        checkpoint.key_of(load_model(CONFIG, weights="random", seed=4), samples, RECIPE),
        checkpoint.key_of(model, samples[:4], RECIPE),
        checkpoint.key_of(model, samples, replace(RECIPE, rate=0.2)),
        checkpoint.key_of(model, samples, replace(RECIPE, rule=Rule(nibble="round"))),
    ]
    assert len({key, *others}) == 5
    for other in others:
        with pytest.raises(InputError, match="other weights, inputs or settings"):
            checkpoint.read(tmp_path / "c.npz", other)


def test_every_damaged_byte_is_noticed_or_harmless(tmp_path: Path) -> None:
    """One byte after another, and every length: an error of one line, or the very state that was written."""
    state = trained(2)
    file = io.BytesIO()
    checkpoint.write(file, state, "key")
    sound, path = file.getvalue(), tmp_path / "c.npz"
    rng = np.random.default_rng(0)
    damaged = [sound[:length] for length in rng.integers(0, len(sound), 40)]
    for at, bit in zip(rng.integers(0, len(sound), 300), rng.integers(0, 8, 300), strict=True):
        flipped = bytearray(sound)
        flipped[at] ^= 1 << bit
        damaged.append(bytes(flipped))
    errors = []
    for data in [*damaged, b"", b"text", b"PK\x03\x04"]:
        path.write_bytes(data)
        try:
            found = checkpoint.read(path, "key")
        except InputError as error:
            errors.append(str(error))
        else:
            for name in checkpoint.FIELDS:
                np.testing.assert_array_equal(getattr(found, name), getattr(state, name))
    assert len(errors) > 150
    assert all("remove it to start anew" in error and "\n" not in error for error in errors)
    with pytest.raises(InputError, match="damaged"):
        checkpoint.read(tmp_path / "absent.npz", "key")


def test_no_pickle_is_read(tmp_path: Path) -> None:
    arrays = {name: np.zeros(1) for name in checkpoint.FIELDS}
    objects = np.array([{}], object)
    np.savez(tmp_path / "c.npz", version=1, key=objects, sha256="", **arrays)
    with pytest.raises(InputError, match="no checkpoint"):
        checkpoint.read(tmp_path / "c.npz", "key")


def test_a_later_version_is_refused(tmp_path: Path) -> None:
    arrays = {name: np.zeros(1) for name in checkpoint.FIELDS}
    np.savez(tmp_path / "c.npz", version=2, key="", sha256="", **arrays)
    with pytest.raises(InputError, match="version 2; 1 can be read"):
        checkpoint.read(tmp_path / "c.npz", "key")


# --- windows --------------------------------------------------------------------------------------------------------


def test_rows_of_ids_become_windows_and_the_last_ones_are_held_out(tmp_path: Path) -> None:
    ids = np.arange(2 * 33).reshape(2, 33) % 40
    np.save(tmp_path / "ids.npy", ids)
    training, held_out = read_samples(tiny(), (tmp_path / "ids.npy",), 7)  # windows of 8, 4 a row
    assert (len(training), len(held_out)) == (6, 2)
    np.testing.assert_array_equal(training.inputs[0], ids[0, :7])
    np.testing.assert_array_equal(training.targets[0], ids[0, 1:8])
    np.testing.assert_array_equal(held_out.inputs[1], ids[1, 24:31])
    training, held_out = read_samples(tiny(), (tmp_path / "ids.npy",) * 2, 7)
    assert (len(training), len(held_out)) == (12, 4)


def test_images_are_windows_of_their_own(tmp_path: Path) -> None:
    config = replace(override(preset("deit-s"), layers=1, d_model=16, heads=4, d_ff=12), features=5, max_positions=9)
    model = load_model(config, weights="random")
    np.save(tmp_path / "images.npy", random_inputs(config, 9, 4))
    training, held_out = read_samples(model, (tmp_path / "images.npy",), None)
    assert training.inputs.shape == (3, 8, 5)
    assert training.targets.shape == (3, 9, 16)
    assert held_out.targets.shape == (1, 9, 16)


@pytest.mark.parametrize(
    ("seq", "message"),
    [(20, "gives 1 window.s. of 20 positions; at least 2"), (None, "give their length"), (40, "gives 0")],
)
def test_too_little_input_is_refused(tmp_path: Path, seq: int | None, message: str) -> None:
    np.save(tmp_path / "ids.npy", np.zeros((1, 33), int))
    with pytest.raises(InputError, match=message):
        read_samples(tiny(), (tmp_path / "ids.npy",), seq)


def test_one_recording_and_windows_of_two_lengths_are_refused_with_a_way_on(tmp_path: Path) -> None:
    config = override(preset("whisper-tiny-en"), layers=1, d_model=16, heads=4, d_ff=12)
    model = load_model(config, weights="random")
    for name, seq in (("one.npy", 5), ("other.npy", 6)):
        np.save(tmp_path / name, random_inputs(config, seq, 3))
    one, other = tmp_path / "one.npy", tmp_path / "other.npy"
    with pytest.raises(InputError, match=r"gives 1 window.s. of its own positions; .* take an .npy of several rows"):
        read_samples(model, (sample("speech"),), None)
    with pytest.raises(InputError, match=r"other.npy gives windows of 12 rows, .*one.npy of 10: give seq"):
        read_samples(model, (one, other), None)
    training, held_out = read_samples(model, (one, other), 5)
    assert training.targets.shape == (4, 5, 16)
    assert held_out.targets.shape == (2, 5, 16)


@pytest.mark.models
def test_text_becomes_windows_with_the_tokens_around_it() -> None:
    from refimpl.weights import pretrained

    if pretrained.folder("minilm-l6") is None:
        pytest.skip("minilm-l6 is not on this machine: effref models fetch minilm-l6")
    model = load_model("minilm-l6", weights="pretrained")
    training, held_out = read_samples(model, (sample("paragraph"),), 32)
    assert training.inputs.shape[1:] == (32,)
    assert len(training) + len(held_out) == 8  # 241 tokens in pieces of 30
    assert (training.inputs[:, 0] == 101).all()  # [CLS]
    assert (training.inputs[:, -1] == 102).all()  # [SEP]


@pytest.mark.parametrize(
    "given", [{"target_kept": 0.0}, {"target_kept": 1.5}, {"rate": 0}, {"batch": 0}, {"start": "zero"}, {"weight": -1}]
)
def test_recipes_outside_of_what_is_allowed_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(given))):
        Recipe(**given)
    assert issubclass(ConfigError, EffrefError)
