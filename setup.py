import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "diffusers_moviegen/__init__.py").read_text(), re.M).group(1)

setup(
    name="diffusers_moviegen",
    version=VERSION,
    description="Movie Gen for diffusers: films and pictures from text, and sound for them",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["diffusers", "text-to-video", "flow matching", "Movie Gen"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["diffusers_moviegen", "diffusers_moviegen.*"]),
    package_data={"diffusers_moviegen": ["checkpoints/**/*", "configs/**/*"]},
    exclude_package_data={"": ["*.pyc"]},
    python_requires=">=3.11",
    # Lower bounds; constraints.txt has the versions the package is tested with.
    install_requires=[
        "accelerate>=1.10",
        "av>=18.0",
        "datasets>=5.0",
        "diffusers>=0.42.1",
        "huggingface_hub>=1.32",
        "numpy>=2.0",
        "peft>=0.17",
        "pillow>=10.3",
        "safetensors>=0.8",
        "torch>=2.8",
        "tqdm>=4.66",
        "transformers>=5.0",
    ],
    extras_require={
        "train": ["pyyaml>=6.0", "tensorboard>=2.18", "torchmetrics>=1.6"],
        "test": ["pytest>=8.0", "pytest-xdist>=3.6", "setuptools>=77"],
        "quality": ["ruff>=0.12"],
        "xformers": ["xformers>=0.0.30"],
    },
    entry_points={"console_scripts": ["moviegen = diffusers_moviegen.cli:main"]},
)
