"""What docker-compose.yml, the Dockerfile and .env say; test_services.py runs what they describe."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dashboards.services import write_env
from tests.services import COMPOSE, PORTS, ROOT, interpolate

FILE: dict[str, Any] = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
SERVICES: dict[str, Any] = FILE["services"]
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
SECRETS = sorted(name for name in write_env.values(EXAMPLE) if write_env.SECRET.fullmatch(name))
LONG_RUNNING = ("database", "objects", "mlflow", "studies", "web", "reporter")


def test_the_file_follows_the_compose_specification() -> None:
    words = [str(Path(sys.executable).with_name("check-jsonschema")), "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_docker_compose_itself_reads_it_as_these_tests_do(tmp_path: Path) -> None:
    tool = next((found for name in ("docker-compose", "docker") if (found := shutil.which(name))), None)
    words = [tool or "", "compose"] if tool and tool.endswith("docker") else [tool or ""]
    if tool is None or subprocess.run([*words, "version"], capture_output=True, check=False).returncode:
        pytest.skip("there is no Docker Compose")
    write_env.main(ROOT / ".env.example", tmp_path / ".env")
    words += ["--file", str(COMPOSE), "--env-file", str(tmp_path / ".env"), "--profile", "*", "config", "--format", "json"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    settings = {name: value.strip("'") for name, value in write_env.values((tmp_path / ".env").read_text()).items()}
    ours = interpolate(SERVICES, settings=settings)
    for name, theirs in json.loads(done.stdout)["services"].items():
        # Docker Compose prints its own answer so that it could be read again: with $$ for each $.
        theirs = interpolate(theirs, settings={})
        assert (theirs.get("environment") or {}) == {key: str(value) for key, value in ours[name].get("environment", {}).items()}
        assert (theirs.get("command") or []) == ours[name].get("command", [])
        assert (theirs.get("entrypoint") or []) == ours[name].get("entrypoint", [])


def test_nothing_starts_without_its_secrets() -> None:
    used = {found[1]: found[2] for found in re.finditer(r"\$\{(\w+)(:[-?])?[^}]*\}", COMPOSE.read_text(encoding="utf-8"))}
    assert sorted(name for name in used if write_env.SECRET.fullmatch(name)) == SECRETS
    settings = {**write_env.values(EXAMPLE), **dict.fromkeys(SECRETS, "given")}
    interpolate(SERVICES, settings=settings)
    for name in SECRETS:
        assert used[name] == ":?"
        for missing in ({**settings, name: ""}, {key: value for key, value in settings.items() if key != name}):
            with pytest.raises(KeyError, match=f"{name} is missing a value: run make secrets"):
                interpolate(SERVICES, settings=missing)
    assert not any(write_env.values(EXAMPLE)[name] for name in SECRETS)


def test_secrets_are_drawn_once_and_only_for_their_owner(tmp_path: Path) -> None:
    env = tmp_path / ".env"
    env.write_text("# mine\nMLFLOW_PORT=5999\nWORKER_PASSWORD=chosen$one\nPOSTGRES_PASSWORD=\n")
    env.chmod(0o644)
    write_env.main(ROOT / ".env.example", env)
    first = env.read_text()
    found = write_env.values(first)
    assert first.startswith("# mine\nMLFLOW_PORT=5999\nWORKER_PASSWORD=chosen$one\nPOSTGRES_PASSWORD=")
    assert set(found) == set(write_env.values(EXAMPLE))
    assert all(len(found[name]) >= 40 for name in SECRETS if name != "WORKER_PASSWORD")
    assert len({found[name] for name in SECRETS}) == len(SECRETS)
    assert stat.S_IMODE(env.stat().st_mode) == 0o600
    write_env.main(ROOT / ".env.example", env)
    assert env.read_text() == first
    write_env.main(ROOT / ".env.example", tmp_path / "other.env")
    assert write_env.values((tmp_path / "other.env").read_text())["POSTGRES_PASSWORD"] != found["POSTGRES_PASSWORD"]


def test_env_files_reach_neither_git_nor_an_image() -> None:
    assert ".env" in (ROOT / ".gitignore").read_text().splitlines()
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert "**/.env*" in ignored
    assert not any("env" in line for line in ignored if line.startswith("!"))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_little_and_is_pinned(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["user"].split(":")[0] not in ("root", "0")
    assert re.search(r":v?\d+\.\d+", service["image"]), "a version, not `latest`"
    assert all("size=" in place for place in service["tmpfs"])
    assert "mem_limit" in service
    if "worker" in name:
        assert (service["mem_limit"], service["cpus"]) == ("${WORKER_MEMORY:-32g}", "${WORKER_CPUS:-0}")
    assert service["networks"] in (["inside"], ["inside", "outside"])
    for port in service.get("ports", []):
        assert port.startswith("${BIND_ADDRESS:-127.0.0.1}:")
        assert "outside" in service["networks"]
    if name in LONG_RUNNING:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"
    else:
        assert service["restart"] == "no"


def test_database_objects_and_workers_are_on_an_inner_network_only() -> None:
    assert FILE["networks"]["inside"]["internal"] is True
    assert {name for name, service in SERVICES.items() if "outside" in service["networks"]} == {"web"}
    assert {name for name, service in SERVICES.items() if service.get("ports")} == {"web"}
    written = set(map(int, re.findall(r"(?<![\w.-])[589]\d{3}(?![\w.])", COMPOSE.read_text(encoding="utf-8"))))
    assert written == set(PORTS)


def test_whatever_is_mounted_or_copied_is_there() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
                assert volume.endswith(":ro")
            elif not source.startswith("$"):
                assert source in FILE["volumes"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    stages = (ROOT / "Dockerfile").read_text().split("\nFROM ")
    for line in re.findall(r"^COPY (?!--from)(.*)$", "\nFROM ".join(stages), re.MULTILINE):
        for source in line.split()[:-1]:
            assert (ROOT / source).exists()
            assert f"!{source}" in ignored
    bases = re.findall(r"^FROM (\S+)", "\nFROM ".join(stages), re.MULTILINE)
    assert all(re.search(r":\d+\.\d+\.\d+-", base) for base in bases)
    for stage in stages[1:]:
        if re.search(r" AS (server|worker)\n", stage):
            assert re.findall(r"^USER (.*)$", stage, re.MULTILINE)[-1] == "1000:1000"
            assert stage.index("USER") > stage.rindex("RUN")


def test_images_are_pinned_by_the_digests_that_were_pulled(tmp_path: Path) -> None:
    for name in ("Makefile", "docker-compose.yml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    tool = tmp_path / "docker"
    tool.write_text("#!/bin/sh\ntest $1 = compose || echo \"$5@sha256:$(printf %s $5 | sha256sum | cut -d' ' -f1)\"\n")
    tool.chmod(0o755)
    for _ in range(2):
        words = ["make", "pin"]
        subprocess.run(words, cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True, capture_output=True)
        pinned = yaml.safe_load((tmp_path / "docker-compose.yml").read_text())["services"]
        for name in ("database", "objects", "web"):
            image = SERVICES[name]["image"]
            assert pinned[name]["image"] == f"{image}@sha256:{hashlib.sha256(image.encode()).hexdigest()}"
        assert pinned["mlflow"] == SERVICES["mlflow"]


def test_images_install_what_is_locked_and_nothing_else() -> None:
    installs = re.findall(r"pip install (.*)", (ROOT / "Dockerfile").read_text().replace("\\\n", " "))
    steps = [step for line in installs for step in line.split("&& pip install ")]
    assert len(steps) == 5
    assert all("--no-deps" in step and ("--require-hashes" in step or step.endswith("--no-build-isolation .")) for step in steps)
    assert all((ROOT / ".ci" / name).is_file() for step in steps for name in re.findall(r"locks/\S+", step))


def test_the_dockerfile_and_the_scripts_pass_their_linters() -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(hadolint), "Dockerfile"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    subprocess.run(["sh", "-n", str(ROOT / "dashboards/services/databases.sh")], check=True)
