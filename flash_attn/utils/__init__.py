"""Helpers for models built on this package: text generation."""
