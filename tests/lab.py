"""A lab for the tests of the services: what it works on, and how it asks for things."""

from __future__ import annotations

from typing import Any

import requests

from tests.services import Stack

TABLE = """
title = "Two heads"
base = "small.toml"
primary = "fewshot_1shot"

[columns]
fewshot_1shot = "1-shot"

[[row]]
key = "dynamic"
label = "dynamic head"

[[row]]
key = "fixed"
label = "fixed head"
set = { "method.head" = "fixed" }
"""
HOW = ("--loader", "torch", "--device", "cpu")


class Lab:
    """A running stack, and a user who works in a folder of it."""

    def __init__(self, stack: Stack) -> None:
        self.stack = stack
        self.place = stack.root / "work"
        self.runs = stack.folders("worker")["/lab/runs"]
        self.uri = stack.address(5000)
        self.inner_uri = stack.address(5001)
        """Of MLflow as workers reach it; everyone else goes through Caddy."""
        self.worker = ("worker", stack.settings["WORKER_PASSWORD"])
        self.admin = ("admin", stack.settings["MLFLOW_ADMIN_PASSWORD"])

    def obowlab(self, *words: str, code: int = 0, **changed: str) -> str:
        """Call the command line as `docker compose run --rm worker` does; return all it says."""
        done = self.stack.call("worker", *words, **changed)
        said = done.stdout + done.stderr
        assert done.returncode == code, said
        return said

    def settled(self, *words: str) -> None:
        """Call a command until MLflow has all of it: a busy server may be late, and the same command sends what it lacks."""
        for _ in range(3):
            warnings = [line for line in self.obowlab(*words).splitlines() if line.startswith("Warning")]
            assert all("did not answer" in line or "is slow" in line for line in warnings), warnings
            if not warnings:
                return
        raise AssertionError(f"MLflow never got what {words} made")

    def ask(self, path: str, *, port: int = 5000, account: tuple[str, str] | None = None, **options: Any) -> Any:
        """Send a request without MLflow's client; POST when there is something to send."""
        method = "POST" if "json" in options else "GET"
        return requests.request(method, self.stack.address(port) + path, auth=account, timeout=30, **options)

    def objects(self) -> list[str]:
        """Return the key of every object in the bucket."""
        import boto3

        found = self.stack.environment("mlflow")
        store = boto3.client(
            "s3",
            endpoint_url=found["AWS_ENDPOINT_URL_S3"],
            aws_access_key_id=found["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key=found["AWS_SECRET_ACCESS_KEY"],
            region_name=found["AWS_DEFAULT_REGION"],
        )
        return [entry["Key"] for entry in store.list_objects_v2(Bucket="mlflow").get("Contents", [])]

    def runs_in_mlflow(self, client: Any, **tags: str) -> list[Any]:
        """Return the runs with these tags (`obowlab.` left out)."""
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        wanted = {f"obowlab.{name}": text for name, text in tags.items()}
        return [run for run in client.search_runs(experiments) if wanted.items() <= run.data.tags.items()]
