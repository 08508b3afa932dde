"""A whole model forth and back: from inputs and thresholds to the output, and from its gradient to that of thresholds.

Weights are frozen. What the way back needs of a layer is kept (a few activations a position), maps are made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from refimpl.config import ModelConfig
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError, ShapeError
from refimpl.model import Runner, position_tables
from refimpl.training.blocks import OPS, Back, feed_forward, linear, norm, project, rotary
from refimpl.training.filter import Attended, Chooser, Rule, thresholded_attention
from refimpl.weights import Model
from refimpl.weights.layout import Weights

LayerBack = Callable[[Array, Array], tuple[Array, Array]]  # dy, dkept (H,) -> dx, dtheta (H,)
LayerChooser = Callable[[int, Array], Array]  # layer, distances (B, H, T, T) -> thresholds (H,)
RECIPES = ("post-norm", "pre-norm")


@dataclass(frozen=True)
class Pass:
    """One forward pass.

    Attributes
    ----------
    output : array
        Hidden states (B, T, d), or logits (B, T, V) where the model has a head.
    thresholds, kept : array, shape (L, H), float64
        What was used, and the share of visible pairs that it kept.
    backward : callable
        Gradients of output and of kept (L, H) -> that of the thresholds (L, H), float64.
    """

    output: Array
    thresholds: Array
    kept: Array
    backward: Callable[[Array, Array], Array]


def check_recipe(config: ModelConfig) -> None:
    """Raise ConfigError where gradients of this kind of model are not here."""
    if config.recipe not in RECIPES or config.position == "relative":
        raise ConfigError(
            f"{config.name} is of the recipe '{config.recipe}' with {config.position} positions; thresholds are "
            f"trained for {' and '.join(RECIPES)} without relative positions: minilm-l6, smollm2-135m, gpt2, deit-s"
        )


@dataclass(frozen=True)
class _Scene:
    """What all layers of a pass share."""

    config: ModelConfig
    rule: Rule
    visible: Array  # bool, (T, T)
    tables: tuple[Array, ...]  # rotary: cos and sin (T, D / 2); else none


class TrainableModel:
    """A model whose attention filters keys by thresholds, and its gradient.

    Parameters
    ----------
    model : Model
        Of a recipe of `RECIPES`; its dtype is that of all activations.
    rule : Rule

    Raises
    ------
    ConfigError
        If the model is of another recipe.
    """

    def __init__(self, model: Model, rule: Rule) -> None:
        check_recipe(model.config)
        self.model, self.config, self.rule = model, model.config, rule
        self._runner = Runner(model, "numpy")

    def __call__(self, inputs: Array, thresholds: Array | LayerChooser, gradient: bool = True) -> Pass:
        """Run forth.

        Parameters
        ----------
        inputs : array
            As `refimpl.forward` takes them.
        thresholds : array (L, H), or callable
            Or layer by layer, from the distances that the layer sees.
        gradient : bool
            Whether `backward` will be called; without it nothing is kept.

        Raises
        ------
        ShapeError, InputError
            Thresholds that are not (L, H); inputs that do not fit the model.
        """
        config, choose = self.config, self._chooser(thresholds)
        x = self._runner.stem(inputs)  # (B, T, d)
        length = x.shape[1]
        visible = np.tri(length, dtype=bool) if config.causal else np.ones((length, length), bool)
        scene = _Scene(config, self.rule, visible, position_tables(config, length, x.dtype))
        thresholds_used, kept = np.zeros((2, config.layers, config.heads))
        backs: list[LayerBack] = []
        for index, w in enumerate(self.model.weights.layers):
            x, attended, back = _LAYERS[config.recipe](x, w, scene, choose(index))
            thresholds_used[index], kept[index] = attended.thresholds, attended.kept
            if gradient:
                backs.append(back)
        output, head_back = self._head(x)

        def backward(doutput: Array, dkept: Array) -> Array:
            dx = head_back(doutput)
            dthresholds = np.zeros((config.layers, config.heads))
            for index in reversed(range(config.layers)):
                dx, dthresholds[index] = backs[index](dx, dkept[index])
            return dthresholds

        return Pass(output, thresholds_used, kept, backward)

    def _chooser(self, given: Array | LayerChooser) -> Callable[[int], Chooser]:
        if callable(given):
            return lambda index: lambda distances: given(index, distances)
        wanted = (self.config.layers, self.config.heads)
        if given.shape != wanted:
            raise ShapeError(f"thresholds have shape {given.shape}; {self.config.name} has (layers, heads) = {wanted}")
        return lambda index: lambda _: given[index]

    def _head(self, x: Array) -> tuple[Array, Back]:
        """The last norm and the tied language head, where there are."""
        weights, backs = self.model.weights, []
        if self.config.final_norm:
            x, back = norm(x, weights.final_norm, self.config)
            backs.append(back)
        if self.config.head:
            x, back = linear(x, weights.stem.embedding)
            backs.append(back)

        def head_back(dy: Array) -> Array:
            for back in reversed(backs):
                dy = back(dy)
            return dy

        return x, head_back


def _attention(x: Array, w: Weights, scene: _Scene, choose: Chooser) -> tuple[Array, Attended, LayerBack]:
    """The attention sublayer: (B, T, d) -> (B, T, d)."""
    config, scale = scene.config, 1.0 / math.sqrt(scene.config.head_dim)
    (q, k, v), qkv_back = project(x, w.qkv.weight, w.qkv.bias, (config.d_attention, config.d_kv, config.d_kv))
    q, q_back = _placed(q, config.heads, scene)  # (B, H, T, D)
    k, k_back = _placed(k, config.kv_heads, scene)  # (B, Hkv, T, D)
    v = OPS.split_heads(v, config.kv_heads)
    attended, attention_back = thresholded_attention(q, k, v, scale, scene.visible, choose, scene.rule)
    y, output_back = linear(OPS.merge_heads(attended.output), w.output.weight, w.output.bias)

    def back(dy: Array, dkept: Array) -> tuple[Array, Array]:
        dcontext = OPS.split_heads(output_back(dy), config.heads)
        dq, dk, dv, dtheta = attention_back(dcontext, dkept)
        return qkv_back(q_back(dq), k_back(dk), OPS.merge_heads(dv)), dtheta

    return y, attended, back


def _placed(x: Array, heads: int, scene: _Scene) -> tuple[Array, Back]:
    """Queries or keys (B, T, H D) as heads, rotated where the model rotates."""
    x = OPS.split_heads(x, heads)
    if scene.config.position != "rotary":
        return x, OPS.merge_heads
    cos, sin = scene.tables
    x, rotary_back = rotary(x, cos, sin, scene.config.rope_interleaved)
    return x, lambda dx: OPS.merge_heads(rotary_back(dx))


def _pre_norm_layer(x: Array, w: Weights, scene: _Scene, choose: Chooser) -> tuple[Array, Attended, LayerBack]:
    """``x = x + attention(norm(x)); x = x + feed_forward(norm(x))``."""
    n, first_norm_back = norm(x, w.attention_norm, scene.config)
    a, attended, attention_back = _attention(n, w.attention, scene, choose)
    n, second_norm_back = norm(x + a, w.feed_forward_norm, scene.config)
    f, feed_forward_back = feed_forward(n, w.feed_forward, scene.config)

    def back(dy: Array, dkept: Array) -> tuple[Array, Array]:
        dx = dy + second_norm_back(feed_forward_back(dy))
        da, dtheta = attention_back(dx, dkept)
        return dx + first_norm_back(da), dtheta

    return x + a + f, attended, back


def _post_norm_layer(x: Array, w: Weights, scene: _Scene, choose: Chooser) -> tuple[Array, Attended, LayerBack]:
    """``x = norm(x + attention(x)); x = norm(x + feed_forward(x))``."""
    a, attended, attention_back = _attention(x, w.attention, scene, choose)
    n, first_norm_back = norm(x + a, w.attention_norm, scene.config)
    f, feed_forward_back = feed_forward(n, w.feed_forward, scene.config)
    y, second_norm_back = norm(n + f, w.feed_forward_norm, scene.config)

    def back(dy: Array, dkept: Array) -> tuple[Array, Array]:
        dn = second_norm_back(dy)
        dx = first_norm_back(dn + feed_forward_back(dn))
        da, dtheta = attention_back(dx, dkept)
        return dx + da, dtheta

    return y, attended, back


_LAYERS = {"pre-norm": _pre_norm_layer, "post-norm": _post_norm_layer}
