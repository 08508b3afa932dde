"""``effref audit``: claims against their sources' form, closed forms against arithmetic, verdicts, runs that fail."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any

import effref as package
import pytest
from effref.auditing import running
from effref.auditing.claims import TAGS, Claim, Reading, claims, claims_of
from effref.auditing.closed_forms import CLOSED_FORMS, encoder
from effref.auditing.measurements import MEASUREMENTS, Lab
from effref.auditing.verdicts import HOLDS, HOLDS_UNDER, NOT_HERE, Outcome, nearest, shown, verdict
from effref.progress import Progress
from hypothesis import given
from hypothesis import strategies as st

from refimpl.config import override, preset
from refimpl.errors import ConfigError, UnsupportedError
from refimpl.weights.layout import shapes

from .conftest import error_of, profile

EVERY_CLAIM = pytest.mark.parametrize("claim", claims().values(), ids=lambda claim: claim.name)
READING_KEYS = {
    "value", "of", "condition", "form", "comparable", "passes", "counted", "weights", "pretrained", "figures", "low",
    "counts",
}  # fmt: skip


def closed(name: str) -> list[Reading]:
    return CLOSED_FORMS[name](claims()[name].settings)


def at(name: str, *words: str) -> float:
    """The one closed form of a claim whose condition has all these words, as parts between commas."""
    found = [one for one in closed(name) if set(words) <= {part.strip() for part in one.condition.split(",")}]
    assert len(found) == 1, (name, words, [one.condition for one in closed(name)])
    return found[0].value


# --- the data -------------------------------------------------------------------------------------------------------


def test_every_claim_has_a_closed_form_and_a_measurement() -> None:
    assert list(claims()) == list(CLOSED_FORMS) == list(MEASUREMENTS)


@EVERY_CLAIM
def test_claim_says_where_it_is_from_and_how_well_that_is_known(claim: Claim) -> None:
    assert claim.tag in TAGS
    assert re.search(r"arXiv \d{4}\.\d{5}|NIPS 2017|ICLR 2022", claim.source)
    if claim.tag == "confirmed":
        assert re.search(r"abstract|full text|Table \d", claim.source)
    assert claim.conditions
    assert claim.not_here
    assert closed(claim.name)


@EVERY_CLAIM
def test_value_of_a_claim_is_the_number_of_its_words(claim: Claim) -> None:
    number, percent = re.findall(r"(\d+(?:\.\d+)?)( %)?", claim.says)[0]
    assert bool(percent) == (claim.form == "share")
    assert claim.value == pytest.approx(float(number) / (100 if percent else 1))


@pytest.mark.parametrize("method", ["reuse", "svd-softmax", "folding", "attmemo", "latte", "kvsharer", "headshare"])
def test_methods_with_a_headline_are_covered(method: str) -> None:
    assert claims_of([method])
    assert all(claim.method == method for claim in claims_of(method))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tag": "unverified recall"}, "unknown tag of the claim"),
        ({"tag": "derived (ours)"}, "unknown tag of the claim"),
        ({"method": "reuze"}, "did you mean 'reuse'"),
        ({"relation": "at most"}, "unknown relation"),
        ({"judged_by": "hearsay"}, "unknown judge"),
        ({"value": -1.0}, "value is -1.0"),
    ],
)
def test_claims_that_must_not_be_kept_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(claims()["reuse-speedup"], **changes)


# --- closed forms, written out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("group", "length"), [(2, 512), (6, 2048), (18, 512)])
def test_reuse_is_bounded_by_the_products_of_its_layers(group: int, length: int) -> None:
    T, d = length, 256
    computes = 8 * T * d**2 + 4 * T**2 * d + 2 * (2 * T - 1) * d**2 + 2 * T * (2 * T - 1) * d
    reuses = 4 * T * d**2 + 2 * T**2 * d
    ratio = group * computes / (computes + (group - 1) * reuses)
    where = ("conformer-m", f"G={group}", f"T={T}")
    assert at("reuse-speedup", "self-attention alone", *where) == pytest.approx(ratio, rel=1e-12)
    assert ratio < 4 * group / (group + 3)  # the bound for T >> d
    (whole,) = (one for one in closed("reuse-speedup") if one.condition == ", ".join(where))
    assert 1 < whole.value < ratio
    linear = 38 * T * d**2  # feed-forwards and pointwise convolutions of a layer; the stem is small beside them
    by_hand = group * (computes + linear) / (computes + (group - 1) * reuses + group * linear)
    assert whole.value == pytest.approx(by_hand, rel=0.02)
    assert at("reuse-training-time", *where) == pytest.approx(1 - 1 / whole.value)


def test_folding_spares_what_counting_its_maps_says() -> None:
    d, f, whole = 512, 2048, 76_738_049  # weights of encoder, predictor and joiner

    def attention(n: int) -> int:
        return 4 * (d // n) ** 2 + 4 * d // n

    def feed_forward(n: int) -> int:
        return 2 * (d // n) * (f // n) + (d + f) // n

    spared = {
        "our setting attention-2": 20 * (attention(1) - attention(2)),
        "our setting attention-4": 20 * (attention(1) - attention(4)),
        "our setting both-2-first-8": 8 * (attention(1) + feed_forward(1) - attention(2) - feed_forward(2)),
        "our setting ffn-2-first-12": 12 * (feed_forward(1) - feed_forward(2)),
    }
    for setting, weights in spared.items():
        assert at("folding-size", "emformer-rnnt-base", setting) == pytest.approx(weights / whole, rel=1e-12)
        reads = 63_605_760 + 0.48 * 8_932_864 + 4.48 * 4_199_425  # weights a chunk reads, predictor and joiner per call
        assert at("folding-power", "emformer-rnnt-base", setting) == pytest.approx(weights / reads, rel=0.02)


def test_svd_softmax_multiplies_as_its_formula_says() -> None:
    V, d, W, N = 800_000, 256, 32, 50_000
    where = ("D=256", "W=32")
    replaced = (d**2 + V * W + N * d) / (V * d)
    added = (d**2 + V * W + N * (d - W)) / (V * d)
    assert (round(100 * replaced, 2), round(100 * added, 2)) == (18.78, 18.0)
    assert at("svd-softmax-multiplications", *where, "full view replace") == pytest.approx(replaced, rel=1e-12)
    assert at("svd-softmax-multiplications", *where, "full view incremental") == pytest.approx(added, rel=1e-12)
    assert at("svd-softmax-speedup", *where, "full view incremental") == pytest.approx(1 / added, rel=1e-12)


@pytest.mark.parametrize("name", ["attmemo-latency-mean", "attmemo-latency-max"])
@pytest.mark.parametrize("T", [256, 512])
def test_attmemo_spares_queries_keys_and_scores_less_the_embedding(name: str, T: int) -> None:
    d, B = 768, 64
    spared = B * (4 * T * d**2 + 2 * T**2 * d) - 64 * B * T * d
    layer = B * (24 * T * d**2 + 4 * T**2 * d)
    assert at(name, f"T={T}", "100 % of the maps found") == pytest.approx(spared / layer, rel=1e-12)
    fewer = at(name, f"T={T}", "41 % of the maps found")
    assert 0.3 * spared / layer < fewer < 0.45 * spared / layer


@pytest.mark.parametrize(("name", "rho"), [("latte-vision", 0.1484), ("latte-language", 0.1009)])
def test_latte_spares_nibble_products(name: str, rho: float) -> None:
    units, flops = (one.value for one in closed(name))
    assert units == pytest.approx(1 - (1 + 7 * rho) / 8, abs=1e-4)
    assert flops == pytest.approx(1 - (1 + 2 * rho) / 2, abs=1e-4)
    assert not any(one.comparable for one in closed(name))


def test_kvsharer_spares_the_layers_that_share_and_little_of_a_step() -> None:
    d, f, L, S = 5120, 13824, 40, 2304
    weights, read = L * (4 * d**2 + 3 * d * f) + 32_000 * d, 2 * S * d * L
    for count in (5, 10, 15):
        where = f"{count} of 40 layers share"
        assert at("kvsharer-computation", "Llama-2-13B", where) == count / 40
        by_hand = (weights + read) / (weights + read - 2 * d**2 * count)
        assert at("kvsharer-speedup", where, f"S={S}") == pytest.approx(by_hand, rel=2e-3)


def test_headshare_spares_a_whole_number_of_heads() -> None:
    own, of_all = (one.value for one in closed("headshare-ratio"))
    assert own == pytest.approx(307 / 1024, rel=1e-12)  # floor(0.3 x 32 x 32) heads of 1024
    whole = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 32_000 * 4096 + 4096
    index = 4 * 1024 / 4  # places of the heads, in weights of 4 bytes
    assert of_all == pytest.approx(307 / 1024 * 32 * 4 * 4096**2 / whole, rel=1e-6)
    assert index < 1e-5 * whole


def test_efficientasr_spares_blocks_of_the_feed_forward_and_projections() -> None:
    config = encoder(claims()["efficientasr-parameters"].settings)
    whole = sum(prod(shape) for shape in shapes(config).values())
    d, f, L = 256, 2048, 12
    by_hand = {(1, 2): L * d * f, (2, 1): L // 2 * (2 * d**2 + 2 * d), (1, 4): L * 3 * d * f // 2}
    by_hand[2, 2] = by_hand[1, 2] + by_hand[2, 1]
    for (group, chunks), spared in by_hand.items():
        found = at("efficientasr-parameters", f"G={group}", f"n={chunks}")
        assert found == pytest.approx(spared / whole, rel=1e-9)


# --- verdicts -------------------------------------------------------------------------------------------------------


def made(value: float, claim: Claim, **changes: Any) -> Reading:
    """A reading of the claim's own quantity, under its own conditions, on real weights."""
    figures = {}
    if claim.besides:
        limit = claim.besides.least if claim.besides.least is not None else claim.besides.most
        figures = {claim.besides.figure: limit}
    return replace(Reading(value, "made", form=claim.form, weights="w", pretrained=True, figures=figures), **changes)


def judged(claim: Claim, *readings: Reading, other: tuple[Reading, ...] = ()) -> Any:
    sides = Outcome(readings), Outcome(other)
    return verdict(claim, *(reversed(sides) if claim.judged_by == "measured" else sides))


@EVERY_CLAIM
def test_a_number_that_meets_the_claim_holds(claim: Claim) -> None:
    found = judged(claim, made(claim.value, claim))
    assert found.kind == (HOLDS_UNDER if claim.unchecked else HOLDS)
    assert claim.unchecked in found.why
    assert found.decided_by.value == claim.value


@EVERY_CLAIM
def test_a_number_far_below_the_claim_does_not_hold(claim: Claim) -> None:
    found = judged(claim, made(claim.value / 2, claim), other=(made(claim.value, claim),))
    assert found.kind == NOT_HERE
    assert claim.not_here in found.why
    assert found.decided_by.value == claim.value / 2


@EVERY_CLAIM
@given(st.floats(0.01, 10), st.floats(0.01, 10))
def test_verdicts_follow_relation_and_tolerance(claim: Claim, first: float, second: float) -> None:
    found = judged(claim, made(first, claim), made(second, claim))
    least, most = claim.value * (1 - claim.tolerance), claim.value * (1 + claim.tolerance)
    met = [least <= value and (claim.relation == "at least" or value <= most) for value in (first, second)]
    away = min(abs(value - edge) for value in (first, second) for edge in (least, most))
    assert (found.kind != NOT_HERE) == any(met) or away < 1e-12
    assert found.decided_by.value in (first, second)


@EVERY_CLAIM
def test_a_condition_is_named(claim: Claim) -> None:
    found = judged(claim, made(claim.value, claim, condition="on the moon"))
    assert found.kind == HOLDS_UNDER
    assert found.why.startswith("on the moon")
    own = judged(claim, made(claim.value, claim, condition="on the moon"), made(claim.value, claim))
    assert not own.why.startswith("on the moon")


@EVERY_CLAIM
def test_what_is_another_quantity_decides_nothing(claim: Claim) -> None:
    found = judged(claim, made(claim.value, claim, comparable=False))
    assert found.kind == NOT_HERE
    assert found.decided_by is not None  # the number stands beside the verdict all the same


@pytest.mark.parametrize("claim", [one for one in claims().values() if one.needs_weights], ids=lambda one: one.name)
def test_random_weights_decide_nothing_where_data_matters(claim: Claim) -> None:
    found = judged(claim, made(claim.value, claim, pretrained=False, weights="seeded random weights"))
    assert found.kind == NOT_HERE
    assert "seeded random weights, and trained weights are needed" in found.why


@pytest.mark.parametrize("claim", [one for one in claims().values() if one.besides], ids=lambda one: one.name)
def test_what_must_hold_besides_decides(claim: Claim) -> None:
    assert claim.besides is not None
    name, limit = claim.besides.figure, claim.besides.least or claim.besides.most
    worse = limit * (0.99 if claim.besides.least else 1.01)
    assert judged(claim, made(claim.value, claim, figures={name: limit})).kind != NOT_HERE
    found = judged(claim, made(claim.value, claim, figures={name: worse}, passes=9, counted="passes"))
    assert found.kind == NOT_HERE
    assert f"met where the {name.replace('_', ' ')} is {worse:.3g}, and at" in found.why
    assert "is not known" in judged(claim, made(claim.value, claim, figures={})).why


@pytest.mark.parametrize("claim", [one for one in claims().values() if one.least_passes], ids=lambda one: one.name)
def test_a_few_noisy_passes_decide_nothing(claim: Claim) -> None:
    timed = made(claim.value * 1.1, claim, counted="passes", passes=claim.least_passes)
    assert judged(claim, timed).kind != NOT_HERE
    assert judged(claim, replace(timed, low=claim.value)).kind != NOT_HERE
    scattered = judged(claim, replace(timed, low=claim.value * 0.9))
    assert scattered.kind == NOT_HERE
    assert "the median meets it" in scattered.why
    few = judged(claim, replace(timed, passes=claim.least_passes - 1))
    assert few.kind == NOT_HERE
    assert "fewer than 3 passes" in few.why


def test_the_reading_that_is_shown_counts_if_one_does() -> None:
    claim = claims()["latte-language"]
    good, bad = made(0.5, claim), made(0.9, claim, figures={"perplexity_rise": 50.0})
    other = made(0.9, claim, comparable=False)
    assert shown(claim, [other, bad, good]) is good
    assert shown(claim, [other, bad]) is bad
    assert shown(claim, [other]) is other
    assert shown(claim, []) is None
    about = claims()["folding-size"]
    readings = [made(value, about) for value in (0.26, 0.245, 0.1)]
    assert nearest(about, readings) is readings[1]


# --- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def lab() -> Lab:
    return Lab(replace(profile(), name="made"), "numpy", "cpu", 1, 0, Progress(), seconds=1e-3)


def _returns(value: float, form: str = "share") -> Any:
    reading = Reading(value, "made", "here", form, pretrained=True, weights="w", passes=3, counted="passes")
    return lambda settings, lab: [reading]


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Measurements that take no time; tests change single ones."""
    table = {name: _returns(claim.value) for name, claim in claims().items()}
    monkeypatch.setattr(running, "MEASUREMENTS", table)
    return table


def _rows(result: Any, code: int = 0) -> dict[str, Any]:
    assert result.exit_code == code, result.stderr
    return {row["claim"]: row for row in json.loads(result.stdout)["results"]}


def test_without_measuring_there_are_closed_forms_alone(effref: Any) -> None:
    result = effref("audit --no-measure --format json --quiet")
    rows = _rows(result)
    assert list(rows) == list(claims())
    document = json.loads(result.stdout)
    assert document["hardware"] is None
    assert result.stderr == ""
    for name, row in rows.items():
        assert row["closed_form"]["shown"] is not None, name
        assert row["measured"]["readings"] == []
        if row["judged_by"] == "measured":
            assert row["verdict"]["kind"] == NOT_HERE
            assert "closed forms alone" in row["verdict"]["why"]
        assert row["verdict"]["decided_by"] is not None


def test_json_has_the_schema_of_all_commands(effref: Any, fast: dict[str, Any]) -> None:
    result = effref("audit", "--format", "json", "--seed", "3")
    document = json.loads(result.stdout)
    assert document["schema_version"] == 1
    assert set(document) == {"schema_version", "context", "config", "hardware", "results", "notes"}
    assert {"date", "cpu", "versions", "commit"} <= set(document["context"])
    assert document["config"] | {"seed": 3, "method": None, "model": None, "measure": True} == document["config"]
    assert document["hardware"]["name"]
    for row in document["results"]:
        assert {"claim", "method", "says", "value", "tag", "source", "conditions", "verdict"} <= set(row)
        assert set(row["closed_form"]) == {"shown", "readings", "reason", "notes", "seconds"} == set(row["measured"])
        for side in ("closed_form", "measured"):
            assert all(set(one) == READING_KEYS for one in row[side]["readings"])
        assert row["verdict"]["kind"] in (HOLDS, HOLDS_UNDER, NOT_HERE)
        assert row["verdict"]["decided_by"] is not None


def test_a_table_and_a_page_show_numbers_and_verdicts(effref: Any, fast: dict[str, Any]) -> None:
    fast["svd-softmax-speedup"] = _returns(4.25, "ratio")
    table = effref("audit --method svd-softmax")
    assert table.exit_code == 0
    assert "claim 2 of 2: svd-softmax-speedup" in table.stderr
    assert "4.25x (3 passes)" in table.stdout
    assert "said while measuring" not in table.stdout
    assert "holds under" in table.stdout

    def disturbed(settings: Any, lab: Any) -> Any:
        lab.progress.note("other programs kept 1.0 of 2 cores busy")
        return _returns(0.5)(settings, lab)

    fast["latte-vision"] = disturbed
    page = effref("audit --method latte --format md --quiet")
    assert re.search(r"\| latte-vision +\| other programs kept 1.0 of 2 cores busy +\|", page.stdout)
    assert "| latte-vision" in page.stdout
    assert "[74.5 %]" in page.stdout


def test_a_claim_that_fails_stops_no_other(effref: Any, fast: dict[str, Any]) -> None:
    def unsupported(settings: Any, lab: Any) -> Any:
        raise UnsupportedError("there are 2 bytes\nof memory")

    def exhausted(settings: Any, lab: Any) -> Any:
        raise MemoryError

    fast |= {"folding-size": unsupported, "svd-softmax-speedup": exhausted}
    rows = _rows(effref("audit --format json"))
    assert len(rows) == len(claims())
    assert rows["folding-size"]["measured"]["reason"] == "there are 2 bytes of memory"
    assert rows["folding-size"]["verdict"]["why"] == "there are 2 bytes of memory"
    assert rows["folding-size"]["verdict"]["decided_by"]["value"] == pytest.approx(0.2462, abs=1e-4)  # closed form
    assert rows["svd-softmax-speedup"]["verdict"]["why"] == "memory ran out"
    others = set(rows) - {"folding-size", "svd-softmax-speedup"}
    assert all(rows[name]["measured"]["readings"] for name in others)


def test_a_bug_is_no_row(effref: Any, fast: dict[str, Any]) -> None:
    fast["folding-size"] = lambda settings, lab: 1 / 0
    assert "this is a bug in effref" in error_of(effref("audit --quiet"))


def test_what_was_done_is_kept_when_it_is_interrupted(effref: Any, fast: dict[str, Any]) -> None:
    def stopped(settings: Any, lab: Any) -> Any:
        raise KeyboardInterrupt

    def partly(settings: Any, lab: Any) -> Any:
        lab.interrupted = True
        return _returns(2.0)(settings, lab)

    for name, stop in (("folding-size", stopped), ("reuse-speedup", partly)):
        fast |= {other: _returns(claims()[other].value) for other in claims()} | {name: stop}
        result = effref("audit --format json")
        rows = _rows(result, 130)
        assert json.loads(result.stdout)["interrupted"] is True
        names = list(claims())
        before, after = names[: names.index(name)], names[names.index(name) + 1 :]
        assert all(rows[other]["measured"]["readings"] for other in before)
        assert all(rows[other]["measured"]["reason"] == running.STOPPED for other in after)
    assert rows["reuse-speedup"]["measured"]["readings"]


def test_rows_are_kept_when_it_is_interrupted_between_two_measurements(
    effref: Any, fast: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(settings: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(CLOSED_FORMS, "folding-size", stopped)
    rows = _rows(effref("audit --format json"), 130)
    assert list(rows) == ["reuse-speedup", "reuse-training-time"]
    monkeypatch.setitem(CLOSED_FORMS, "reuse-speedup", stopped)
    assert "interrupted" in error_of(effref("audit --quiet"), 130)


def test_time_is_shared_and_ends(effref: Any, fast: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    now, given_s = [0.0], []

    def slow(settings: Any, lab: Any) -> Any:
        given_s.append(lab.seconds)
        now[0] += 40
        return _returns(1.0)(settings, lab)

    monkeypatch.setattr(running, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    fast |= dict.fromkeys(fast, slow)
    rows = _rows(effref("audit --format json --max-seconds 100"))
    assert given_s == pytest.approx([100 / len(rows), 60 / (len(rows) - 1), 20 / (len(rows) - 2)])
    reasons = [row["measured"]["reason"] for row in rows.values()]
    assert reasons == [""] * 3 + [running.NO_TIME] * (len(rows) - 3)


def test_methods_are_chosen(effref: Any, fast: dict[str, Any]) -> None:
    rows = _rows(effref("audit --method kvsharer,headshare --format json"))
    assert list(rows) == ["kvsharer-computation", "kvsharer-speedup", "headshare-ratio"]
    document = package.audit("headshare", measure=False)
    assert [row["claim"] for row in document["results"]] == ["headshare-ratio"]
    assert document["config"]["method"] == ["headshare"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--method reuze", "did you mean 'reuse'"),
        ("--method dense", "no claim about dense is kept"),
        ("--model nowhere", "unknown model 'nowhere'"),
        ("--engine fast", "unknown engine 'fast'"),
        ("--device gpu --engine numba", "runs on the cpu"),
        ("--hardware nowhere", "nowhere"),
        ("--max-seconds 0", "max-seconds"),
        ("--max-seconds nan", "nan is no number"),
        ("--output nowhere/audit.json", "there is no folder"),
    ],
)
def test_bad_requests_are_refused(effref: Any, arguments: str, message: str) -> None:
    assert message in error_of(effref(f"audit --quiet {arguments}"))


# --- measurements ---------------------------------------------------------------------------------------------------


def test_held_bytes_are_those_of_the_closed_form(effref: Any) -> None:
    rows = _rows(effref("audit --method efficientasr --engine numpy --threads 1 --hardware xeon-8480 --format json"))
    row = rows["efficientasr-parameters"]
    expected = {one["condition"]: one["value"] for one in row["closed_form"]["readings"]}
    assert len(row["measured"]["readings"]) == 2
    for one in row["measured"]["readings"]:
        assert one["value"] == pytest.approx(expected[one["condition"]], rel=1e-6)
    assert row["verdict"]["kind"] == HOLDS_UNDER


def test_reuse_is_timed_as_a_whole_and_in_part(lab: Lab) -> None:
    lab.model = override(preset("conformer-m"), layers=2, d_model=32, heads=2, d_ff=64)  # type: ignore[assignment]
    settings = {"model": "conformer-m", "measured_groups": [2], "measured_length": 16}
    whole, part = MEASUREMENTS["reuse-speedup"](settings, lab)
    assert whole.condition == "conformer-m, G=2, T=16, on a CPU"
    assert part.condition.startswith("self-attention alone, ")
    assert whole.passes == part.passes == 1
    assert whole.value > 0
    assert whole.weights == part.weights == "seeded random weights, seed 0"
    assert whole.figures["speedup_flash"] > 0
    assert whole.low == pytest.approx(whole.value)  # one pass has no spread
    lab.seconds = 5.0
    whole, part = MEASUREMENTS["reuse-speedup"](settings, lab)
    assert whole.passes == 5
    assert whole.low < whole.value
    assert part.low < part.value


TINY = {"layers": 4, "d_model": 24, "heads": 6, "kv_heads": 3, "d_ff": 20, "vocab": 60}


def test_language_models_are_measured_for_several_claims(lab: Lab) -> None:
    lab.model = override(preset("smollm2-135m"), **TINY)  # type: ignore[assignment]
    about = {"model": "smollm2-135m"}
    shared = {**about, "measured": [1, 2], "measured_kv_len": 8}
    computed = MEASUREMENTS["kvsharer-computation"](shared, lab)
    timed = MEASUREMENTS["kvsharer-speedup"](shared, lab)
    assert [one.value for one in computed] == [0.25, 0.5]
    assert all(one.passes and one.value > 0 for one in timed)
    assert [one.figures["perplexity"] for one in timed] == [one.figures["perplexity"] for one in computed]
    assert len(lab.done) == 1  # one run for both
    filtered = MEASUREMENTS["latte-language"]({**about, "length": 32, "over": [1.0, 0.3]}, lab)
    assert [one.value for one in filtered] == [0.0, 0.7]
    assert abs(filtered[0].figures["perplexity_rise"]) < abs(filtered[1].figures["perplexity_rise"])
    guided = MEASUREMENTS["svd-softmax-multiplications"]({**about, "agreement": 1.0, "positions": 8}, lab)
    assert [one.passes for one in guided] == [8, 8]
    assert all(one.value > 0 and one.figures["top1_agreement"] == 1 for one in guided)
    assert not any(one.pretrained for one in (*computed, *timed, *filtered, *guided))


def test_a_head_and_a_chunk_are_timed(lab: Lab) -> None:
    head = {"words": 3000, "width": 32, "window": 4, "candidates": 90, "kv_len": 4}
    (reading,) = MEASUREMENTS["svd-softmax-speedup"](head, lab)
    assert reading.form == "ratio"
    assert reading.value > 0
    lab.model = override(preset("emformer-rnnt-base"), layers=2, d_model=64, heads=4, d_ff=64)  # type: ignore[assignment]
    settings = {"model": "emformer-rnnt-base", "measured": "attention-2"}
    (chunk,) = MEASUREMENTS["folding-power"](settings, lab)
    assert not chunk.comparable


def test_a_database_is_profiled_once_for_two_claims(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"tau": 0.9, "hit_rate": 0.5, "speedup_dense": 1.25, "speedup_flash": 1.1, "cosine": 0.995, "rel_l2": 0.1}
    found = {"thresholds": [row], "model": "m", "length": 8, "batch": 2, "records": 5, "passes": 6}
    lab.done["memo"] = {**found, "weights": "trained", "pretrained": True}
    for name in ("attmemo-latency-mean", "attmemo-latency-max"):
        (reading,) = MEASUREMENTS[name]({"memo": {}}, lab)
        assert reading.value == pytest.approx(0.2)
        assert "50 % of the maps found" in reading.condition
        assert reading.comparable
    row["hit_rate"] = 0.0
    (reading,) = MEASUREMENTS["attmemo-latency-mean"]({"memo": {}}, lab)
    assert not reading.comparable
    lab.done.clear()
    lab.device = "gpu"
    with pytest.raises(UnsupportedError, match="on the CPU alone"):
        MEASUREMENTS["attmemo-latency-mean"]({"memo": {"model": "minilm-l6"}}, lab)
