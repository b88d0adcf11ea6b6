"""Attention: products, kernels, masks."""
