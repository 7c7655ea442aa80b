"""Speeds side by side in one run: timing, peers, results, tables."""
