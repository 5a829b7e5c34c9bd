"""What is read out of a capture: features on one token grid, words, matches, clusters, attention, maps, selections of keys."""
