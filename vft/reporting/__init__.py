"""What a run was and how it went: as one page, and as the card of what it exports."""

from vft.reporting.model_card import write_card
from vft.reporting.run_report import write_report
