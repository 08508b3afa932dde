"""The canonical weights: names, shapes, counts of published models, and the checks of `assemble`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import RECIPES, configs

from refimpl.config import ModelConfig, preset, presets
from refimpl.errors import WeightsError
from refimpl.weights.layout import assemble, layer_shapes, shapes
from refimpl.weights.random import random_weights

SMALL = ModelConfig("small", "pre-norm", 2, 8, 2, 16, vocab=10, position="learned", max_positions=6)

# Published parameter counts of what the layout covers; where they are from is said beside them.
PARAMETERS = {
    "minilm-l6": 22_713_216 - (384 * 384 + 384),  # the file's floats without its pooler
    "whisper-tiny-en": 8_209_920 - 3,  # the encoder's floats, less three one-element settings
    "smollm2-135m": 134_515_008,  # the file's floats
    "gpt2": 124_439_808,  # the model card's 124 M
    "emformer-rnnt-base": 63_605_760,  # transcriber of torchaudio.models.emformer_rnnt_base, any number of symbols
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_count_published_parameters(name: str) -> None:
    count = sum(math.prod(shape) for shape in shapes(preset(name)).values())
    assert count == pytest.approx(PARAMETERS[name], abs=3)


def test_an_emformer_layer_has_the_parameters_of_torchaudios() -> None:
    """Attention 1,050,624, feed-forward 2,099,712 and three norms of 1,024."""
    assert sum(math.prod(shape) for shape in layer_shapes(preset("emformer-rnnt-base")).values()) == 3_153_408


@pytest.mark.parametrize("name", presets())
def test_shapes_of_every_preset_are_positive(name: str) -> None:
    table = shapes(preset(name), positions=7)
    assert all(min(shape) > 0 for shape in table.values())
    assert len({n for n in table if n.startswith("layers.0.")}) * preset(name).layers == sum(
        n.startswith("layers.") for n in table
    )


def test_shapes_follow_the_positions_asked_for() -> None:
    assert shapes(SMALL)["stem.positions"] == (6, 8)
    assert shapes(SMALL, positions=99)["stem.positions"] == (99, 8)


@given(st.sampled_from(RECIPES).flatmap(configs))
def test_assemble_reaches_every_weight(config: ModelConfig) -> None:
    tensors = random_weights(config)
    weights = assemble(config, tensors)
    for name, values in tensors.items():
        node = weights
        for part in name.split("."):
            node = node[int(part)] if part.isdigit() else getattr(node, part)
        assert node is values


def test_assemble_reads_an_absent_bias_as_none() -> None:
    config = preset("smollm2-135m")
    config = ModelConfig("tiny", config.recipe, 1, 8, 2, 4, bias=False, vocab=3)
    assert assemble(config, random_weights(config)).layers[0].attention.qkv.bias is None


def test_assemble_names_a_missing_weight() -> None:
    tensors = random_weights(SMALL)
    del tensors["layers.1.attention.output.weight"]
    with pytest.raises(WeightsError, match=r"lack 'layers\.1\.attention\.output\.weight' of shape \(8, 8\)"):
        assemble(SMALL, tensors)


def test_assemble_names_a_superfluous_weight() -> None:
    with pytest.raises(WeightsError, match=r"hold 'layers\.2\.x'"):
        assemble(SMALL, {**random_weights(SMALL), "layers.2.x": np.zeros(1)})


def test_assemble_names_a_wrong_shape() -> None:
    tensors = random_weights(SMALL)
    tensors["stem.embedding"] = tensors["stem.embedding"].T
    with pytest.raises(WeightsError, match=r"'stem\.embedding' has shape \(8, 10\); the model needs \(10, 8\)"):
        assemble(SMALL, tensors)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_assemble_names_a_weight_that_is_not_finite(value: float) -> None:
    tensors = random_weights(SMALL)
    tensors["final_norm.bias"][3] = value
    with pytest.raises(WeightsError, match=r"'final_norm\.bias' holds NaN or infinite"):
        assemble(SMALL, tensors)
