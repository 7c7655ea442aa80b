"""Schedules as data: actions, the schedules, their checks and their files."""
