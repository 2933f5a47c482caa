"""The Triton backend's kernels and their launches: attention for any GPU that Triton serves."""
