"""The report of a run: a page with numbers and pictures."""
