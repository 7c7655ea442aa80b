"""Schedules seen: simulated, recorded, drawn."""
