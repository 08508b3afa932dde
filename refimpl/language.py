"""What one asks of a language model beside its logits: how probable a text is, and how it goes on.

Letters: B batch, T positions, V vocabulary. ``logits[b, t]`` are those of the token that follows position t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from refimpl.cache import Cache
from refimpl.engines.protocol import Array
from refimpl.errors import ConfigError, InputError, ShapeError, UnsupportedError
from refimpl.model import Prepared, Run, Runner
from refimpl.weights import Model

START = "<|endoftext|>"  # in front of every document that GPT-2 and SmolLM2 were trained on


def negative_log_likelihood(logits: Array, ids: Array) -> Array:
    """How improbable each given next token was: ``-ln softmax(logits)[id]``, in nats.

    Parameters
    ----------
    logits : array, shape (B, T, V)
    ids : array of int, shape (B, T)
        The token that did follow each position.

    Returns
    -------
    array, shape (B, T), float64
        Computed row by row as ``(max - logit[id]) + ln sum exp(logit - max)``, in float64 whatever the logits' dtype.

    Raises
    ------
    ShapeError
        If the shapes disagree.
    InputError
        If an id is outside of the vocabulary, or logits are NaN or infinite (-inf is a probability of 0).
    """
    _check(logits, ids)
    found = np.empty(ids.shape)  # (B, T)
    for at in np.ndindex(*ids.shape):
        row = logits[at].astype(np.float64)  # (V,)
        top = row.max()
        if not math.isfinite(top):
            raise InputError(f"the logits at {at} have the maximum {top}: a finite one is needed")
        found[at] = top - row[ids[at]] + math.log(np.exp(row - top).sum())
    return found


def perplexity(logits: Array, ids: Array) -> float:
    """``exp(mean(negative_log_likelihood(logits, ids)))``, the mean over all B T tokens.

    Parameters and errors are those of `negative_log_likelihood`. Of several passes, average the likelihoods, not the
    perplexities.

    Examples
    --------
    >>> import numpy as np
    >>> from refimpl.language import perplexity
    >>> round(perplexity(np.zeros((1, 3, 50)), np.array([[7, 0, 49]])), 6)  # a model that knows nothing
    50.0
    """
    if ids.size == 0:
        raise InputError("no token is given: a perplexity needs at least one")
    with np.errstate(over="ignore"):  # inf where a token was next to impossible
        return float(np.exp(negative_log_likelihood(logits, ids).mean()))


def windows(model: Model, text: str, length: int, count: int, start: str = START) -> Array:
    """The first `count` windows of `length` tokens of a text, each with a start token in front.

    Parameters
    ----------
    model : Model
        Its tokenizer reads the text; it adds nothing of its own.
    text : str
    length, count : int
        Tokens of a window, without the start token; windows follow each other without overlap.
    start : str
        What stands for the beginning of a text.

    Returns
    -------
    ids : array, shape (count, length + 1), int64
        ``forward(model, ids[:, :-1])`` gives the logits of all ``count * length`` tokens ``ids[:, 1:]``.

    Raises
    ------
    InputError
        If the text is too short, the tokenizer has no such start token, or the model reads no text.
    """
    if length < 1 or count < 1:
        raise InputError(f"length is {length} and count {count}; both must be at least 1")
    tokenizer = model.tokenizer()
    first = tokenizer.token_to_id(start)
    if first is None:
        raise InputError(
            f"the tokenizer of {model.config.name} has no token '{start}': give the one that begins a text"
        )
    tokens = tokenizer.encode(text, add_special_tokens=False).ids
    if len(tokens) < count * length:
        raise InputError(f"the text has {len(tokens)} tokens; {count} windows of {length} need {count * length}")
    body = np.array(tokens[: count * length], np.int64).reshape(count, length)
    return np.insert(body, 0, first, axis=1)  # (count, length + 1)


def generate(
    runner: Runner,
    ids: Array,
    count: int,
    method: str | Prepared = "dense",
    params: Mapping[str, Any] | None = None,
) -> Array:
    """The most probable continuation, token by token, with keys and values cached.

    Parameters
    ----------
    runner : Runner
        Holds a language model.
    ids : array of int, shape (B, T)
        The beginning; at least one token.
    count : int
        How many tokens to add; none ends a text early.
    method, params
        A name of the catalogue and its parameters, or a prepared method.

    Returns
    -------
    ids : array, shape (B, count), int64

    Raises
    ------
    ConfigError
        If the model has no language head or is not causal.
    InputError
        If `count` is not positive, or the model has fewer positions than are needed.
    """
    config = runner.config
    if not config.generates:
        raise ConfigError(f"{config.name} is no causal language model: it continues nothing")
    if count < 1:
        raise InputError(f"count is {count}; at least one token is needed")
    ready = runner.prepare(method, params, ids) if isinstance(method, str) else method
    cache = runner.new_cache(ids.shape[1] + count - 1, ready, batch=len(ids))
    found = np.empty((len(ids), count), np.int64)
    logits = runner(ids, ready, record=False, cache=cache).output  # (B, T, V)
    found[:, 0] = np.argmax(logits[:, -1, :], axis=-1)
    if count > 1:
        step = _step(runner, ready, cache)
    for at in range(1, count):
        logits = step(found[:, at - 1 : at]).output  # (B, 1, V)
        found[:, at] = np.argmax(logits[:, -1, :], axis=-1)
    return found


def _step(runner: Runner, ready: Prepared, cache: Cache) -> Callable[[Array], Run]:
    """What takes ids (B, 1) one step on: recorded where engine and method allow it."""
    try:
        return runner.recorded_step(ready, cache)
    except UnsupportedError:
        return lambda ids: runner(ids, ready, record=False, cache=cache)


def _check(logits: Array, ids: Array) -> None:
    if logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise ShapeError(f"logits have shape {logits.shape}, ids {ids.shape}: (B, T, V) and (B, T) are needed")
    if ids.dtype.kind not in "iu":
        raise InputError(f"ids are {ids.dtype}; token ids must be whole numbers")
    if ids.size and (ids.min() < 0 or ids.max() >= logits.shape[2]):
        raise InputError(f"ids are {ids.min()} to {ids.max()}; the vocabulary is 0 to {logits.shape[2] - 1}")
