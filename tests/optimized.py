"""The package as `python -O` sees it, without its `assert` statements, while pytest keeps those of the tests.

`OBOWLAB_TEST_OPTIMIZE=1` (`make test-optimized`) enters it: an `assert` that guards input would let that input pass, and the test
of its refusal fails.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import CodeType, ModuleType

VARIABLE = "OBOWLAB_TEST_OPTIMIZE"
PACKAGE = "obowlab"


class _Loader(SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)  # the byte code that Python keeps has the asserts
        return compile(self.get_data(path), path, "exec", dont_inherit=True, optimize=1)


class _Finder(PathFinder):
    @classmethod
    def find_spec(cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname.partition(".")[0] != PACKAGE:
            return None
        spec = super().find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def enter() -> None:
    """Take the asserts of the package away, here and in child processes, if the variable asks for it."""
    if os.environ.get(VARIABLE):
        os.environ["PYTHONOPTIMIZE"] = "1"
        sys.meta_path.insert(0, _Finder)
