"""Whether a run used its data as it should have: every sample of each finished epoch once, over all restarts."""

from ckptengine.audit.report import AuditedCheckpoint, AuditReport, CursorReport, Finding, LifeReport
from ckptengine.audit.run import audit

__all__ = ["AuditReport", "AuditedCheckpoint", "CursorReport", "Finding", "LifeReport", "audit"]
