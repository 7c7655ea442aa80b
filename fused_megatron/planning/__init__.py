"""Planning of a run before it starts: memory, communication, time, a search of layouts, a dry run, verification."""
