"""The papers' headline claims beside what the cost model says and what was measured here."""

from __future__ import annotations

from .running import audit

__all__ = ["audit"]
