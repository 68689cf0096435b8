"""What a run was and how it went: as one page, and as the card of what it exports."""

from vft.report.card import write_card
from vft.report.page import write_report
