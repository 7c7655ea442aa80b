"""What carries a collective: the process group, or memory that the ranks of a host share."""
