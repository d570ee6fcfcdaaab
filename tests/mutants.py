"""Run mutmut and print, per module, the share of its mutants that the tests notice: `make mutants`.

mutmut changes one operator, number, string or argument of a pure module at a time and runs the tests that reach it, as
`[tool.mutmut]` in pyproject.toml says. `.venv/bin/mutmut browse` shows the mutants that survived. Names may narrow it down:
`python -m tests.mutants bow schedules`.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
UNNOTICED = {0, 5, 33}
"""What mutmut keeps of a mutant: tests that pass (0), or no test that reaches it; None is a mutant that was not tried."""


def main(names: list[str]) -> int:
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutmut"]["only_mutate"]
    chosen = [Path(module) for module in modules if not names or Path(module).stem in names]
    patterns = [".".join(path.with_suffix("").parts) + "*" for path in chosen]
    code = subprocess.run([Path(sys.executable).with_name("mutmut"), "run", *patterns], cwd=ROOT, check=False).returncode
    for path in chosen:
        found = json.loads((ROOT / "mutants" / f"{path}.meta").read_text())["exit_code_by_key"]
        survived = sorted(name for name, exit_code in found.items() if exit_code in UNNOTICED)
        tried = sum(exit_code is not None for exit_code in found.values())
        print(f"{path}: {tried - len(survived)} of {tried} mutants noticed ({1 - len(survived) / max(1, tried):.1%})")
        for name in survived:
            print(f"    {name}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
