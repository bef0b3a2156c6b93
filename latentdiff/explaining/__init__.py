"""What happens while an image is drawn: recorded without a change of its bits, and as a figure."""

from latentdiff.explaining.figure import draw_figure
from latentdiff.explaining.record import Explanation, explain

__all__ = ["Explanation", "draw_figure", "explain"]
