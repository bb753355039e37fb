"""Observations from other frameworks: parameter files, PyTorch's layouts, Flower."""
