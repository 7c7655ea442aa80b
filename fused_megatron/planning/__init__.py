"""Needs of a run, known before it starts: memory, communication, a dry run."""
