"""Weights in files, in and out: Hugging Face folders, GGUF."""
