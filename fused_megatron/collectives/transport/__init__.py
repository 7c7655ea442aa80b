"""Transports of collectives: the process group, or memory that the ranks of one host share."""
