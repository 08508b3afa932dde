"""The methods. `CATALOG` is the one table that runner, cost model, command line and documentation read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from refimpl.config import ModelConfig, preset
from refimpl.errors import ConfigError
from refimpl.parameters.composition import canonical, members, parameters_of


@dataclass(frozen=True)
class Method:
    """A row of the catalogue."""

    title: str
    paper: str
    exact: bool
    model: str  # the example model, used where none is named
    equation: str
    reading: str  # what our reading adds where the source is silent
    off: str = ""  # the exact method that the first value of the sweep equals, bit for bit on the NumPy engine
    off_with: Mapping[str, Any] = field(default_factory=dict)  # what else has to be switched off
    not_off: str = ""  # why there is no such equality, and which holds instead


# In reading order: the exact baselines first.
CATALOG: dict[str, Method] = {
    "dense": Method(
        title="exact attention, map materialised",
        paper="Vaswani et al., arXiv 1706.03762",
        exact=True,
        model="conformer-m",
        equation="Y = softmax(Q K^T / sqrt(D) + mask) V Wo^T",
        reading="nothing",
    ),
    "flash": Method(
        title="exact attention, fused",
        paper="Dao et al., arXiv 2205.14135",
        exact=True,
        model="conformer-m",
        equation="Y = softmax(Q K^T / sqrt(D) + mask) V Wo^T, row blocks with a running maximum; no T x T map",
        reading="relative positions are added tile by tile inside the fused op",
    ),
    "reuse": Method(
        title="attention map reuse across layers",
        paper="Shim, Choi, Sung, arXiv 2301.12444",
        exact=False,
        model="conformer-m",
        equation="compute layer: A = softmax(Q K^T / sqrt(D) + mask), Y = A V Wo^T; reuse layer: Y = A (X Wv^T) Wo^T",
        reading="group size and grouping (not known from the paper), the kept output projection, the sharing point",
        off="dense",
    ),
    "folding": Method(
        title="folding attention: linear maps on parts of a position",
        paper="Li et al., arXiv 2309.07988",
        exact=False,
        model="emformer-rnnt-base",
        equation="X'[t n + j] = X[t, j d/n : (j+1) d/n], Y' = softmax(Q' K'^T / sqrt(D') + mask) V' Wo'^T on T n rows",
        reading="n, heads, mask, folded layers and feed-forward (the paper's are not known); weights by projection",
        off="dense",
    ),
    "svd-softmax": Method(
        title="language head by preview, selection and full view",
        paper="Shim et al., NIPS 2017, p. 5463",
        exact=False,
        model="smollm2-135m",
        equation="A = U S Q^T, R = A Q, g = Q^T h; z_i = R[i, :W] . g[:W] for all words, "
        "z_i += R[i, W:] . g[W:] for the N largest",
        reading="W and N by default, selection by threshold, ties, the two copies of R, weighting by activations",
        not_off="the head is summed in the basis of its singular vectors: a full window equals dense up to rounding",
    ),
    "attmemo": Method(
        title="attention maps looked up in a database",
        paper="Feng et al., arXiv 2301.09262",
        exact=False,
        model="minilm-l6",
        equation="D = min_i |f(X) - f(X_i)|; 1 - D >= tau: Y = A_i (X Wv^T) Wo^T, A_i the stored map; else as dense",
        reading="a network and an index per layer, exact search, padding left out of distances, all heads in a record",
        off="dense",
    ),
    "latte": Method(
        title="keys filtered by 4-bit estimates, a threshold for each head",
        paper="Wang, Lin, Wu, arXiv 2404.07519",
        exact=False,
        model="minilm-l6",
        equation="keep j iff m~_ij >= max_j m~_ij - theta_h sqrt(D) / (sigma_q sigma_k), m~ from 4 bits; "
        "Y = softmax over kept keys (Q K^T / sqrt(D) + mask) V Wo^T",
        reading="scales per head and tensor, floor nibbles, kept scores of the 8-bit codes, float values, thresholds "
        "calibrated to a kept part",
        off="dense",
        off_with={"stage2": "float"},  # kept scores in 8 bits are a part of their own
    ),
    "kvsharer": Method(
        title="keys and values shared across layers",
        paper="Yang et al., arXiv 2410.18517",
        exact=False,
        model="smollm2-135m",
        equation="shared layer i with source j < i: O_i = softmax(Q_i K_j^T / sqrt(D) + mask) V_j Wo_i^T",
        reading="C by default a quarter of the layers, samples cut to one length, shared layers without Wk and Wv",
        off="dense",
    ),
    "headshare": Method(
        title="attention weights shared by heads",
        paper="Cao, Yang, Zhao, arXiv 2402.11819",
        exact=False,
        model="minilm-l6",
        equation="floor(r L H) best matches: Wq, Wk, Wv, Wo of head (l, h) = those of (l', h'), l' < l; then as dense",
        reading="chains of matches are followed to their end; biases of q, k, v are shared; ties; no grouped key heads",
        off="dense",
    ),
    "efficientasr": Method(
        title="EfficientASR, our reading: shared residual attention, feed-forward in chunks of channels",
        paper="Wang et al., arXiv 2404.19214",
        exact=False,
        model="conformer-m",
        equation="compute layer: R = Q K^T / sqrt(D) + alpha R_before, A = softmax(R + mask + band), Y = A V Wo^T; "
        "reuse layer: Y = A (X Wv^T) Wo^T; feed-forward: [act(x_1 W1_1^T) W2_1^T, ..., act(x_n W1_n^T) W2_n^T]",
        reading="everything: the source gives no equation; weights by projection",
        off="dense",
        off_with={"score_residual": 0, "ffn_chunks": 1},
    ),
    "fewer-heads": Method(
        title="fewer heads of the same width",
        paper="Michel, Levy, Neubig, arXiv 1905.10650 (heads removed); which ones: ours",
        exact=False,
        model="conformer-m",
        equation="Y = sum over H' kept heads h of softmax(Q_h K_h^T / sqrt(D) + mask) V_h Wo_h^T",
        reading="the heads with the greatest norm of Wo_h Wv_h are kept, key heads leave with their query heads, "
        "nothing is rescaled",
        off="dense",
    ),
    "narrow": Method(
        title="narrower heads",
        paper="Eckart, Young, Psychometrika 1936 (nearest matrix of a rank); the method: ours",
        exact=False,
        model="conformer-m",
        equation="Y = sum over h of softmax(Q_h' K_h'^T / sqrt(D') + mask) V_h' Wo_h'^T, D' < D",
        reading="Wq_h^T Wk_h and Wv_h^T Wo_h^T as the nearest matrices of rank D'; no rotary positions",
        off="dense",
    ),
    "local": Method(
        title="attention within a window",
        paper="Beltagy, Peters, Cohan, arXiv 2004.05150 (sliding window)",
        exact=False,
        model="conformer-m",
        equation="Y_i = sum over |j - i| <= w of softmax_j(q_i k_j^T / sqrt(D) + mask) v_j Wo^T",
        reading="w counts positions on either side; one w for all layers and heads; no global positions, no dilation",
        off="flash",
    ),
    "linformer": Method(
        title="keys and values projected along time",
        paper="Wang, Li, Khabsa, Fang, Ma, arXiv 2006.04768",
        exact=False,
        model="whisper-tiny-en",
        equation="Y = softmax(Q (E K)^T / sqrt(D) + mask) (E V) Wo^T, E (k, T)",
        reading="E made for a length instead of learned, one for all; a key of hidden positions alone is hidden",
        off="dense",
    ),
    "linear": Method(
        title="linear attention: feature maps for softmax",
        paper="Katharopoulos, Vyas, Pappas, Fleuret, arXiv 2006.16236",
        exact=False,
        model="whisper-tiny-en",
        equation="Y_i = phi(q_i) (sum_j phi(k_j) v_j^T) / (phi(q_i) . sum_j phi(k_j)) Wo^T, phi(x) = elu(x) + 1",
        reading="weights of a model that was trained with softmax; rotary positions before phi; no cache of the state",
        not_off="phi(q) . phi(k) is another kernel than exp(q . k), and no phi of D numbers makes the two equal. The "
        "output equals that of the map of its own kernel, with rows that sum to 1, up to rounding",
    ),
}


def method(name: str) -> Method:
    """The catalogue row called `name`, or one for several methods; raises ConfigError for an unknown name."""
    names = members(name)
    return CATALOG[names[0]] if len(names) == 1 else _combined(names)


def _combined(names: tuple[str, ...]) -> Method:
    """A row for methods joined by ``+``."""
    rows = [CATALOG[name] for name in names]
    return Method(
        title="; ".join(f"{name}: {row.title}" for name, row in zip(names, rows, strict=True)),
        paper="; ".join(dict.fromkeys(row.paper for row in rows)),
        exact=all(row.exact for row in rows),
        model=_example(names),
        equation="; ".join(row.equation for row in rows),
        reading="; ".join(f"{name}: {row.reading}" for name, row in zip(names, rows, strict=True)),
    )


def _example(names: tuple[str, ...]) -> str:
    """The first of the members' example models that all of them can run on; else the first."""
    models = [CATALOG[name].model for name in names if not CATALOG[name].exact] or [CATALOG[names[0]].model]
    for model in models:
        try:
            parameters("+".join(names), None, preset(model))
        except ConfigError:
            continue
        return model
    return models[0]


def parameters(name: str, given: Any, config: ModelConfig) -> Any:
    """The parameters of a method, or of several joined by ``+``, checked against the model."""
    made = parameters_of(canonical(name), given)
    made.check(config)
    return made
