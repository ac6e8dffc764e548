"""Encoders for the data path: byte tokens always, the published tokenizer where it is at hand."""

import os
from pathlib import Path

import pytest

from data_tools.examples.encode import Encoder, ImageSettings
from train.modeling.tiny import write_model_files

SETTINGS = ImageSettings(784, 200_000)


@pytest.fixture(scope="session")
def byte_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder whose tokenizer makes every byte a token."""
    folder = tmp_path_factory.mktemp("byte-model")
    write_model_files(folder)
    return folder


@pytest.fixture(scope="session")
def byte_encoder(byte_folder: Path) -> Encoder:
    return Encoder.from_folder(byte_folder, SETTINGS)


@pytest.fixture(scope="session")
def published_encoder() -> Encoder:
    """Tokenizer and chat template of the published model."""
    folder = Path(os.environ.get("LECTERN_MODELS", "")) / "qwen2.5-vl-7b"
    if not (folder / "vocab.json").is_file():
        pytest.skip("LECTERN_MODELS does not name a folder with qwen2.5-vl-7b/vocab.json")
    return Encoder.from_folder(folder, SETTINGS)


@pytest.fixture(params=["byte", "published"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    """Both tokenizers, one after the other."""
    return request.getfixturevalue(f"{request.param}_encoder")
