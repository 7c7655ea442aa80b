"""Prediction of the time of a training step on a cluster, from constants of the cluster."""
