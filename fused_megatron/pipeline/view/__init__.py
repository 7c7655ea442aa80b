"""Timelines of schedules: simulated, recorded, and drawn."""
