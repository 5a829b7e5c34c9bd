"""Metrics of the field, and the statistics behind every interval. Knows no model and no data set."""
