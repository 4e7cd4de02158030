"""Results as people see them: one view model, drawn on a terminal, as a page and as Markdown.

The report is one self-contained HTML page for managers and engineers. It reads run.json and
plan.json only, so a figure that was not recorded cannot be in it.
"""
