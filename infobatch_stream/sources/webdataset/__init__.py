"""Samples of WebDataset tars, read by index."""
