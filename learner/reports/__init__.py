"""The report of runs as data: reading a run directory, charts, images, timeline, the page."""
