"""REMEMBERS: every accepted job and every durable event, in one database, one transaction per batch.

SQLite by default, PostgreSQL by URL. Knows the core's records and the request's spec; no Ray, no clock.
"""

from __future__ import annotations

from rm.ledger.ledger import Ledger
from rm.ledger.rows import Accepted, Batch, EventRow, JobRow, Loaded

__all__ = ["Accepted", "Batch", "EventRow", "JobRow", "Ledger", "Loaded"]
