"""What a run was and how it went: as one page, and as the card of what it exports."""

from vft.reporting.report import serve_command, write_card, write_report
