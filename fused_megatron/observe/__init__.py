"""Ledgers, counters and formulas: communication, FLOPs, bytes, waits; and the processor."""
