"""Records in; tables, figures and one HTML page out.

No torch, no network; matplotlib is imported when something is drawn.
"""

from e2llm.report.canvas import Drawing
from e2llm.report.coverage import coverage_figure, write_coverage
from e2llm.report.figures import perplexity_figure, retrieval_figure, scale_figure, training_figure
from e2llm.report.latex import results_latex
from e2llm.report.markdown import results_markdown
from e2llm.report.page import render_page, save_figures, write_report
from e2llm.report.tables import perplexity_table, retrieval_table

__all__ = [
    "Drawing",
    "coverage_figure",
    "perplexity_figure",
    "perplexity_table",
    "render_page",
    "results_latex",
    "results_markdown",
    "retrieval_figure",
    "retrieval_table",
    "save_figures",
    "scale_figure",
    "training_figure",
    "write_coverage",
    "write_report",
]
