"""Cluster files of `ray up`, looked through before they cost anything: `rmctl cluster check`.

`check` reads the text and goes through the rules, each a generator of findings: what Ray itself demands
(`ray_schema`), and what Ray accepts and a team with GPUs regrets (`node_types`, `sizes`, `commands`, `network`).
No node is started, no cloud is asked, and nothing of the file is run or imported.
"""

from rm.cluster_files.checking import Report, check
from rm.cluster_files.findings import Finding, Severity

__all__ = ["Finding", "Report", "Severity", "check"]
