"""Sampling as GPU kernels: edits of logits, sums, thresholds, draws and scores."""
