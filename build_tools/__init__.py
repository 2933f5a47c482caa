"""Builds what is compiled: CUDA kernels, the host library, the torch shims.

`python -m build_tools --help`. Parts are content-addressed under `build/`, so a build that was cut
off goes on where it stopped, and nothing is compiled twice.
"""
