"""pyproject.toml has the metadata, build_tools/install.py what is compiled."""

from setuptools import setup

from build_tools.install import BdistWheel, BinaryDistribution, Build, BuildNative

setup(
    distclass=BinaryDistribution,
    cmdclass={"bdist_wheel": BdistWheel, "build": Build, "build_native": BuildNative},
)
