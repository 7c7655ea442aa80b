"""Measurement: communication ledger, FLOPs, bytes moved, free memory, waits, parts of a step, processor."""
