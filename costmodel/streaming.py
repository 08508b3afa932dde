"""The chunks that a pass of a streaming model is made of: which kinds there are, and how often each runs.

Until the left context is full every chunk meets more earlier positions than the one before it; from then on all are
alike. So a pass of any length has at most ceil(left_context / chunk) + 2 kinds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from costmodel.methods.steps import Setting
from costmodel.ops import Quantity
from refimpl.config import ModelConfig, Workload


def chunks_of(config: ModelConfig, workload: Workload) -> list[Setting]:
    """The kinds of chunks of a pass, with their `calls`; the last positions may make a shorter one."""
    right, moved = config.right_context, 0 if workload.fills_cache else config.left_context
    found: list[Setting] = []
    for start, times in _starts(config, workload):
        for size, past, calls, compacting in _kinds(config, workload.seq, start, moved > 0):
            one = Setting(config, workload.batch, size + right, 0, past, cached=True, ahead=right)
            found.append(replace(one, calls=times * (calls - compacting)))
            found.append(replace(one, calls=times * compacting, moved=moved))
    return [setting for setting in found if np.any(setting.calls)]


def cached_positions(config: ModelConfig, workload: Workload) -> tuple[Quantity, Quantity]:
    """Positions that the cache keeps for the next chunk, and those that it is allotted for."""
    positions = workload.kv_len + workload.steps * workload.seq
    allotted = positions if workload.fills_cache else config.own_cache
    return _at_most(positions, config.left_context), allotted + config.right_context


def earlier_outputs(s: Setting, workload: Workload) -> Quantity:
    """Elements of what was given before the last chunk of this kind; all of it is joined at the end."""
    chunk, is_whole = s.config.chunk, s.T - s.ahead == s.config.chunk
    chunks = workload.steps * workload.seq // chunk - is_whole
    return s.B * chunks * chunk * (s.config.d_out or s.config.d_model)


def _starts(config: ModelConfig, workload: Workload) -> Iterator[tuple[Quantity, int]]:
    """Earlier positions that the steps of a workload begin with; steps behind a full left context are one kind."""
    for step in range(workload.steps):
        start = _at_most(workload.kv_len + step * workload.seq, config.left_context)
        if np.all(start == config.left_context):
            yield start, workload.steps - step
            return
        yield start, 1


def _kinds(
    config: ModelConfig, seq: Quantity, start: Quantity, compacts: bool
) -> Iterator[tuple[Quantity, Quantity, Quantity, Quantity]]:
    """Of each kind of chunk in `seq` positions behind `start` earlier ones: its positions, the earlier positions that
    it sees, how many there are, and how many of them compact the cache first."""
    chunk, left = config.chunk, config.left_context
    whole, rest = seq // chunk, seq % chunk
    filling = int(np.max(-(-(left - start) // chunk)))
    for index in range(filling):
        yield chunk, _at_most(start + index * chunk, left), (whole > index) * 1, 0
    behind, compacting = whole - filling, compacts * _compactions(config, whole)
    yield chunk, left, behind * (behind > 0), compacting
    more = compacts * _compactions(config, whole + 1) - compacting
    size = rest + (rest == 0) * chunk  # none of size 0, also where an array has some without a shorter chunk
    yield size, _at_most(start + whole * chunk, left), (rest > 0) * 1, (rest > 0) * more


def _compactions(config: ModelConfig, chunks: Quantity) -> Quantity:
    """How often so many chunks find a pass's own cache full: first when it is full from the beginning, then each time
    that it is full behind a left context."""
    fitting = config.own_cache // config.chunk
    times = -(-(chunks - fitting) // config.compacted_chunks)
    return times * (times > 0)


def _at_most(positions: Quantity, limit: int) -> Quantity:
    return np.minimum(positions, limit) if isinstance(positions, np.ndarray) else min(positions, limit)
