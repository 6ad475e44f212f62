"""Packaging; tools are configured in pyproject.toml."""

import pathlib

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
# Read and write prepared datasets without TensorFlow; the second is undeclared there.
TFDS = ["array_record>=0.8", "importlib_resources>=6.4", "tensorflow-datasets>=4.9.10"]

setup(
    name="dpmix_jax",
    version="0.1.0",
    description="Differentially private image classification with DP-Mix, in JAX",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["dpmix_jax", "dpmix_jax.*"]),
    package_data={"dpmix_jax": ["py.typed"]},
    install_requires=[
        "absl-py>=2.3",
        "dp-accounting>=0.6",
        "flax>=0.12",
        "jax>=0.10",
        "jax_privacy>=2.0,<3",
        "joblib>=1.4",
        "matplotlib>=3.9",
        "ml_collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.20",
        "pillow>=11.0",
        "safetensors>=0.5",
        "scikit-learn>=1.5",
        "scipy>=1.14",
    ],
    extras_require={
        "cuda12": ["jax[cuda12]>=0.10"],
        "diffusion": ["diffusers>=0.42", "torch==2.13.0", "transformers>=5.0"],
        "peers": ["opacus==1.6.0", "torch==2.13.0"],
        "test": ["hypothesis>=6.100", "pytest>=8.3", "pytest-xdist>=3.6", *TFDS],
        "tfds": TFDS,
        "tfds-prepare": [*TFDS, "tensorflow-cpu>=2.19"],
        "towers": [
            "open_clip_torch==3.3.0",
            "timm==1.0.31",
            "torch==2.13.0",
            "torchvision==0.28.0",
            "transformers>=5.0",
        ],
    },
)
