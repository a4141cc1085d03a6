"""The run's report: one self-contained HTML page with the result table, image panels, curves and facts.

Fill a `Report` and hand it to `write_report`; nothing here trains, evaluates or reads a run's files.
"""

from lidnet_fast.report.data import Arm, Column, Curve, Forest, Panel, Report, ScoreMaps
from lidnet_fast.report.page import write_report

__all__ = ["Arm", "Column", "Curve", "Forest", "Panel", "Report", "ScoreMaps", "write_report"]
