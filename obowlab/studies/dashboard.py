"""Serve optuna-dashboard on a study storage: `python -m obowlab.studies.dashboard HOST PORT`.

The address of the storage and the token (`tracking.guard`) come through the environment, because command lines are seen by
everybody on the machine.
"""

from __future__ import annotations

import os
import sys
from wsgiref.simple_server import WSGIRequestHandler, make_server

from obowlab.errors import UserError
from obowlab.studies.storage import STORAGE_VARIABLE, open_storage, quiet
from obowlab.tracking.guard import Guard, guarded_wsgi


class _SilentHandler(WSGIRequestHandler):
    """Answers requests without writing a line for each."""

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def main(argv: list[str]) -> int:
    """Serve until the process is ended; return 2 when the storage cannot be opened."""
    host, port = argv[0], int(argv[1])
    guard = Guard.of_environment(port)
    with quiet():
        try:
            storage = open_storage(os.environ[STORAGE_VARIABLE])
        except UserError as error:
            print(f"Error: {error}", file=sys.stderr)
            return 2
        from optuna_dashboard import wsgi

        with make_server(host, port, guarded_wsgi(wsgi(storage), guard=guard), handler_class=_SilentHandler) as server:
            server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
