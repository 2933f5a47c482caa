"""Layers around attention: rotary position embeddings."""
