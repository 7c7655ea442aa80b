"""Search for the fastest layout of a model on a cluster, with the reasons against the others."""
