"""Cleaning: features, duplicates, wrong labels, overlap with test sets."""
