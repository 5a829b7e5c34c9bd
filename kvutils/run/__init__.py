"""What `make` calls: the command line, the notebooks and their results, reports, downloads, the plan."""

PROFILES = ("pocket", "paper")
DEFAULT = ("pocket", "pocket")  # the profile and model whose results, figures and notebooks are committed
DONE, FAILED, MISUSED, BY_HAND, STOPPED = 0, 1, 2, 3, 130  # exit codes; see kvutils.run.cli
