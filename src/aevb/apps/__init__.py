"""Front doors: the command line and the report. Each figure they print comes from `summary`."""
