"""Planning of a run before it starts: memory, communication, a dry run, verification of a layout."""
