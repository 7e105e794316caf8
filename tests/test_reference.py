"""README's reference of the command line is what the program says."""

import os
import subprocess
import sys

from conftest import CHECKOUT


def test_the_readme_says_what_the_program_says():
    tool = os.path.join(CHECKOUT, "tools", "reference")
    answer = subprocess.run([sys.executable, tool, "--check"], capture_output=True, text=True, check=False)

    assert (answer.returncode, answer.stderr) == (0, "")
