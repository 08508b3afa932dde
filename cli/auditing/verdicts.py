"""From readings to a verdict: rules only, the thresholds are those of the claims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from .claims import Claim, Reading

HOLDS, HOLDS_UNDER, NOT_HERE = "holds", "holds under", "not reproducible here"


@dataclass(frozen=True)
class Outcome:
    """What one side, closed form or measurement, came to.

    Attributes
    ----------
    readings : tuple of Reading
        The conditions nearest to the claim's own first.
    reason : str
        Why there is no reading, or none more.
    notes : tuple of str
        What was said while it was measured.
    seconds : float
        That it took.
    """

    readings: tuple[Reading, ...] = ()
    reason: str = ""
    notes: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class Verdict:
    """What a claim came to.

    Attributes
    ----------
    kind : {"holds", "holds under", "not reproducible here"}
    why : str
        The condition, or the reason.
    decided_by : Reading or None
        The reading that meets the claim, or the one that comes nearest.
    """

    kind: str
    why: str
    decided_by: Reading | None


def verdict(claim: Claim, closed_form: Outcome, measured: Outcome) -> Verdict:
    """Judge a claim by the side that its data names.

    A reading counts if it is the quantity of the claim, if what must hold besides does, and if it ran on real weights
    where the claim needs them. The claim holds where one that counts meets it under the claim's own conditions; holds
    under a condition where it was met under another one, or a part of it was not looked at; and is not reproducible
    here otherwise.
    """
    judge = measured if claim.judged_by == "measured" else closed_form
    counting = [one for one in judge.readings if counts(claim, one)]
    meeting = [one for one in counting if claim.meets(one)]
    if not meeting:
        found = nearest(claim, judge.readings) or nearest(claim, closed_form.readings + measured.readings)
        return Verdict(NOT_HERE, _why_not(claim, judge), found)
    best = next((one for one in meeting if not one.condition), None)
    best = best or (nearest(claim, meeting) if claim.relation == "about" else meeting[0])
    assert best is not None
    under = "; ".join(part for part in (best.condition, claim.unchecked and f"not checked: {claim.unchecked}") if part)
    return Verdict(HOLDS_UNDER if under else HOLDS, under, best)


def counts(claim: Claim, reading: Reading) -> bool:
    """Whether a reading can decide."""
    if not reading.comparable or (claim.needs_weights and not reading.pretrained) or too_few(claim, reading):
        return False
    return claim.besides is None or claim.besides.holds(reading.figures)


def too_few(claim: Claim, reading: Reading) -> bool:
    """Whether it is a time of fewer passes than the claim asks for."""
    return reading.counted == "passes" and (reading.passes or 0) < claim.least_passes


def shown(claim: Claim, readings: Sequence[Reading]) -> Reading | None:
    """The reading that stands in a table: one that counts and comes nearest, else any that is comparable, else any."""
    for some in (
        [one for one in readings if counts(claim, one)],
        [one for one in readings if one.comparable],
        list(readings),
    ):
        found = nearest(claim, some)
        if found is not None:
            return found
    return None


def nearest(claim: Claim, readings: Sequence[Reading]) -> Reading | None:
    """The first that meets the claim where it is a limit; else the one at the least distance, comparable ones first."""
    comparable = [one for one in readings if one.comparable] or list(readings)
    if claim.relation == "at least":
        met = next((one for one in comparable if one.comparable and claim.meets(one)), None)
        if met is not None:
            return met
    return min(comparable, key=lambda one: abs(one.value - claim.value), default=None)


def _why_not(claim: Claim, judge: Outcome) -> str:
    """What is missing: a reading, trained weights, passes, a narrow spread, what must hold besides; or the claim's."""
    if not judge.readings and judge.reason:
        return judge.reason
    random = [one for one in judge.readings if one.comparable and one.weights and not one.pretrained]
    if claim.needs_weights and len(random) == len(judge.readings):
        return f"measured on {random[0].weights}, and trained weights are needed; {claim.not_here}"
    if judge.readings and all(too_few(claim, one) for one in judge.readings):
        return f"fewer than {claim.least_passes} passes were timed: raise --max-seconds, or close other programs"
    if any(counts(claim, one) and claim.meets(replace(one, low=None)) for one in judge.readings):
        return "the median meets it, the low end of the passes does not: measure where nothing else runs"
    without = next((one for one in judge.readings if one.comparable and claim.meets(one)), None)
    if without and claim.besides:
        return f"{claim.besides.missed(without.figures)}; {claim.not_here}"
    return claim.not_here
