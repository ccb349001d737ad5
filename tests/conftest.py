import os
from collections import Counter


# Set before any library reads it: the tests never reach out to the Hub.
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402
from diffusers import attention_backend  # noqa: E402

from tests.tiny import tiny_pipeline  # noqa: E402


@pytest.fixture(autouse=True)
def default_attention_backend():
    """`set_attention_backend` of one model changes the default of the process; no test leaves that to the next."""
    with attention_backend("native"):
        yield


@pytest.fixture
def pipeline():
    return tiny_pipeline()


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    """Folder of a saved tiny pipeline. Tests that change files copy it first."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def confusion(record_property):
    """Records a confusion table, which ends up in the summary of the test run, and returns the share judged right.

    `confusion(title, asked, judged)` takes two equally long lists; answers never asked for count as "other".
    """

    def report(title, asked, judged):
        names = sorted(set(asked), key=str)
        counts = Counter((a, j if j in names else "other") for a, j in zip(asked, judged, strict=True))
        columns = names + ["other"] * any(column == "other" for _, column in counts)
        width = max(len(str(name)) for name in columns) + 2
        lines = [
            f"{title} (rows: asked for, columns: judged)",
            " " * width + "".join(f"{c!s:>{width}}" for c in columns),
        ]
        for name in names:
            lines.append(f"{name!s:>{width}}" + "".join(f"{counts[name, c] or '.':>{width}}" for c in columns))
        record_property("confusion", "\n".join(lines))
        return sum(counts[name, name] for name in names) / len(asked)

    return report


def pytest_terminal_summary(terminalreporter):
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.getreports(outcome)]
    tables = [text for report in reports for name, text in report.user_properties if name == "confusion"]
    if tables:
        terminalreporter.section("confusion tables")
        terminalreporter.write_line("\n\n".join(sorted(tables)))
