"""The page of the audit: that of the stored run, whose claims and closed forms are those of today."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from effref.auditing.claims import Reading, claims
from effref.auditing.closed_forms import CLOSED_FORMS
from effref.auditing.verdicts import Outcome, counts, verdict

DOCS = Path(__file__).parents[2] / "docs"


def _audited() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audited", DOCS / "audited.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_that_of_the_stored_run() -> None:
    audited = _audited()
    text = audited.PAGE.read_text("utf-8")
    assert audited.filled(text) == text, "run: python docs/audited.py"


def test_the_stored_run_is_of_the_claims_and_closed_forms_of_today() -> None:
    rows = json.loads(_audited().RESULT.read_text("utf-8"))["results"]
    assert [row["claim"] for row in rows] == list(claims())
    for row in rows:
        claim = claims()[row["claim"]]
        for name in ("says", "value", "form", "relation", "tolerance", "tag", "source", "conditions", "judged_by"):
            assert row[name] == getattr(claim, name), f"{claim.name}: {name}; run the audit again"
        stored_readings = [{**one} for one in row["measured"]["readings"]]
        counted = [one.pop("counts") for one in stored_readings]
        readings = [Reading(**one) for one in stored_readings]
        assert counted == [counts(claim, one) for one in readings]
        today = tuple(CLOSED_FORMS[claim.name](claim.settings))
        stored = [one["value"] for one in row["closed_form"]["readings"]]
        assert stored == pytest.approx([one.value for one in today], rel=1e-9)
        found = verdict(claim, Outcome(today), Outcome(tuple(readings), row["measured"]["reason"]))
        assert (found.kind, found.why) == (row["verdict"]["kind"], row["verdict"]["why"])
        assert found.decided_by is not None


def test_the_stored_run_names_no_place_of_the_machine() -> None:
    text = _audited().RESULT.read_text("utf-8")
    assert "/tmp" not in text
    assert "/home" not in text
