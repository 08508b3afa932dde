"""Head-wise shareable attention (Cao, Yang, Zhao, arXiv 2402.11819): heads take the weights of heads of earlier layers.

    (Wq, Wk, Wv, Wo)_(l, h)  =  (Wq, Wk, Wv, Wo)_(l', h')     for the floor(r L H) best matches, l' < l

Weights are shared, not maps: every head still projects its own layer's hidden state. The forward pass is that of
``dense`` on weights in which replaced heads have the slices of their sources.
"""

from __future__ import annotations

from dataclasses import replace

from refimpl.config import ModelConfig
from refimpl.methods.dense import Dense
from refimpl.methods.subject import Subject
from refimpl.parameters.headshare import HeadShareParameters, Matches
from refimpl.preparation.headpool import share
from refimpl.preparation.headshare import find_matches
from refimpl.weights.layout import Weights


class HeadShare(Dense):
    """``dense``; what differs are the weights."""

    parameters: HeadShareParameters

    @classmethod
    def complete(cls, parameters: HeadShareParameters, subject: Subject) -> HeadShareParameters:
        """With the matches, found from the weights unless they are given."""
        config = subject.model.config
        if parameters.is_complete(config):
            return parameters
        found = find_matches(subject.model.weights, config, parameters.match, subject.progress)
        record = {
            "model": config.name,
            "layers": config.layers,
            "heads": config.heads,
            "match": parameters.match,
            "cosines": [match.cosine for match in found],
        }
        return replace(parameters, matches=Matches((match[:4] for match in found), record))

    @classmethod
    def derive(cls, weights: Weights, config: ModelConfig, parameters: HeadShareParameters) -> Weights:
        """The matrices of every layer, in full, with the slices of replaced heads taken from their sources."""
        return share(weights, config, parameters.sources(config), parameters.share_output)
