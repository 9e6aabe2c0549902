"""Packages the library and, inside it, the configs; everything else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fpn_plugin*"]), "fpn_plugin.configs"],
    # configs/ stands at the top of the checkout and travels inside the package.
    package_dir={"fpn_plugin.configs": "configs"},
    package_data={"fpn_plugin.configs": ["*.yaml", "*/*.yaml"]},
)
