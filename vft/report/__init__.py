"""What a run was and how it went, as one page."""

from vft.report.page import write_report

__all__ = ["write_report"]
