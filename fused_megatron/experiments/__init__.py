"""Experiments of the tutorial and of the papers as data: a run on this machine beside the published machine."""
