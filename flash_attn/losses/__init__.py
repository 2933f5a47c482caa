"""Losses, under their published paths."""
