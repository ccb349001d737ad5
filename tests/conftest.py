import os


# Set before any library reads it: the tests never reach out to the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402

from tests.tiny import tiny_pipeline  # noqa: E402


@pytest.fixture
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """Folder of a saved tiny pipeline. Tests that change files copy it first."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder
