"""Packaging: the short folders at the top are installed under the `fused_beit` namespace. All else: pyproject.toml."""

from setuptools import find_packages, setup

FOLDERS = {"fused_beit.kernels": "kernels", "fused_beit.engine": "engine", "fused_beit.ds_configs": "ds_configs"}

packages = list(FOLDERS)
for package, folder in FOLDERS.items():
    packages += [f"{package}.{name}" for name in find_packages(folder)]

setup(packages=packages, package_dir=FOLDERS)
