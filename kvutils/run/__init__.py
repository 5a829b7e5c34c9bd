"""What `make` calls: notebooks, reports, downloads, plans, the command line."""
