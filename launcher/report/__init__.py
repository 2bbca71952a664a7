"""A ranking as one self-contained HTML page: report=plan.html. Inline SVG, no script, no network."""
