"""Weights: sources and folders of models, slices of layers, adapters, and the proof of each architecture."""
