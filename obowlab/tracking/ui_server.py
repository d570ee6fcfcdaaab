"""Serve MLflow's pages on a store: `python -m obowlab.tracking.ui_server HOST PORT`, what `obowlab ui` starts.

`mlflow server` has no place for a guard in front of the application it serves, and takes the address of the store, which may
hold a password, from its command line. Address, folder of the artifacts and token come through the environment.
"""

from __future__ import annotations

import os
import sys

from obowlab.tracking.guard import Guard, guarded_asgi

STORE_VARIABLE = "OBOWLAB_UI_STORE"
ARTIFACTS_VARIABLE = "OBOWLAB_UI_ARTIFACTS"


def main(argv: list[str]) -> int:
    """Serve until the process is ended."""
    host, port = argv[0], int(argv[1])
    guard = Guard.of_environment(port)
    from mlflow.server import constants

    store = os.environ.pop(STORE_VARIABLE)
    os.environ.update(
        {
            constants.BACKEND_STORE_URI_ENV_VAR: store,
            constants.REGISTRY_STORE_URI_ENV_VAR: store,
            constants.ARTIFACT_ROOT_ENV_VAR: os.environ.pop(ARTIFACTS_VARIABLE),
            constants.SERVE_ARTIFACTS_ENV_VAR: "true",
            constants.ARTIFACTS_DESTINATION_ENV_VAR: "./mlartifacts",
            "_MLFLOW_SGI_NAME": "uvicorn",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
    )
    import uvicorn
    from mlflow.server.fastapi_app import app

    uvicorn.run(guarded_asgi(app, guard=guard), host=host, port=port, log_level="warning", access_log=False, server_header=False)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
