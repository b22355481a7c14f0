"""Training machinery that knows no model, no data set and no command line."""
