"""Schedules as data: actions, all schedules by name, their checks, and their files."""
