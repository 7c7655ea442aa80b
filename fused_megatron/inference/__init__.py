"""Sampling from a model, in any layout."""
