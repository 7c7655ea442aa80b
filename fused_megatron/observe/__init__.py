"""Ledgers, counters and formulas: communication, FLOPs, bytes."""
