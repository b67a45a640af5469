"""Whole networks: every normalization of one is measured over given batches."""
