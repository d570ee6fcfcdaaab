"""No `assert` of the package guards input: `make test-optimized` plays the tests without them."""

from __future__ import annotations

import os
import subprocess
import sys


def test_asserts_of_the_package_are_gone_and_those_of_the_tests_stay() -> None:
    program = (
        "from tests import optimized\n"
        "optimized.enter()\n"
        "from obowlab.training import work\n"
        "import dis, subprocess, sys\n"
        "ops = {each.opname for each in dis.get_instructions(work.Work.encoders)}\n"
        "print('LOAD_ASSERTION_ERROR' in ops, __debug__)\n"
        "print(subprocess.run([sys.executable, '-c', 'print(__debug__)'], capture_output=True, text=True).stdout)\n"
    )
    shown = {}
    for value in ("", "1"):
        environment = {**os.environ, "OBOWLAB_TEST_OPTIMIZE": value}
        environment.pop("PYTHONOPTIMIZE", None)
        done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
        shown[value] = done.stdout.split()
    assert shown == {"": ["True", "True", "True"], "1": ["False", "True", "False"]}
