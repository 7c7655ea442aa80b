"""Benchmarks that time our ops beside other implementations in one run: timing, peers, results files, tables."""
