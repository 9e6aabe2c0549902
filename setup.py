"""Packages the library and, inside it, the configs; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

# configs/ stands at the top of the checkout and travels inside the package, a folder a package.
folders = [Path("configs"), *(path for path in Path("configs").rglob("*") if path.is_dir())]
folders = [folder for folder in folders if folder.name != "__pycache__"]
configs = {".".join(["fpn_plugin", *folder.parts]): str(folder) for folder in folders}

setup(
    packages=[*find_packages(include=["fpn_plugin*"]), *configs],
    package_dir=configs,
    package_data={package: ["*.yaml"] for package in configs},
)
