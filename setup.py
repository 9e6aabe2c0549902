"""Packages the library and, inside it, the configs; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# configs/ stands at the top of the checkout and travels inside the package, a folder a package.
configs = {"fpn_plugin.configs": "configs"}
configs |= {
    f"fpn_plugin.configs.{folder.name}": f"configs/{folder.name}"
    for folder in Path("configs").iterdir()
    if folder.is_dir()
}

setup(
    packages=[*find_packages(include=["fpn_plugin*"]), *configs],
    package_dir=configs,
    package_data={package: ["*.yaml"] for package in configs},
)
