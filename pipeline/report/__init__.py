"""What the scores say: results, statistics, figures and the page."""
