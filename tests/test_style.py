"""The linter, the formatter and the type checker, with the settings of pyproject.toml: what they say is a failure."""

import os
import subprocess
import sys

CHECKOUT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# Scripts without a suffix have to be named; beside them is a picture.
TOOLS = sorted(
    entry.path
    for entry in os.scandir(os.path.join(CHECKOUT, "tools"))
    if entry.is_file() and not entry.name.endswith(".svg")
)


def assert_no_complaint(*command):
    """Run a tool on the checkout with this interpreter; all that it printed is shown when it found something."""
    argv = [sys.executable, "-m", *command]
    answer = subprocess.run(argv, cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def test_the_linter_finds_nothing():
    assert_no_complaint("ruff", "check", "--no-cache", "--output-format=concise", ".", *TOOLS)


def test_every_file_is_formatted():
    assert_no_complaint("ruff", "format", "--no-cache", "--check", ".", *TOOLS)


def test_the_types_agree(tmp_path):
    # What one run learns speeds up the next, unless the checkout is somebody else's.
    cache = ".mypy_cache" if os.access(CHECKOUT, os.W_OK) else tmp_path
    assert_no_complaint("mypy", f"--cache-dir={cache}", "--scripts-are-modules", "jhansi_runtime", *TOOLS)
