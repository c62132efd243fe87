"""REMEMBERS: every accepted job and every durable event, in one database, one transaction per batch.

SQLite by default, PostgreSQL by URL. Knows the core's records and the request's spec; no Ray, no clock.
"""

from __future__ import annotations

from rm.ledger.checking import Finding, Report, Summary, check
from rm.ledger.copies import Restored, back_up, restore
from rm.ledger.ledger import Ledger
from rm.ledger.rows import Accepted, AppliedPolicy, Batch, EventRow, JobRow, Loaded

__all__ = [
    "Accepted",
    "AppliedPolicy",
    "Batch",
    "EventRow",
    "Finding",
    "JobRow",
    "Ledger",
    "Loaded",
    "Report",
    "Restored",
    "Summary",
    "back_up",
    "check",
    "restore",
]
