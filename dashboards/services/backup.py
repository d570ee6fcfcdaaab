"""Save the databases and the object store to a folder, and put them back.

Usage: python backup.py save FOLDER | check BACKUP | restore BACKUP, each with --runs RUNS_ROOT for the run store as well.

A backup is a folder `obowlab-TIME`: a dump of every database, `objects.tar` with every object under its key, `runs.tar` on
request, and `manifest.json` with sizes and SHA-256. It is written beside and renamed, so that one with that name is whole.
Databases come first, objects after them: files that a saved run names are older than its row, and MLflow deletes none by itself.
Addresses and passwords come from the environment: PGHOST, PGPORT, PGUSER, PGPASSWORD, AWS_ENDPOINT_URL_S3 and the keys
(docker-compose.yml, service `backup`). Objects are streamed; no member of `objects.tar` ever becomes a file.
With BACKUP_PASSPHRASE every file but the manifest is encrypted by openssl (AES-256, names end in `.enc`); the manifest, with the
hashes of what is encrypted, is signed.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

VERSION = 1
BUCKET = "mlflow"
OWNERS = {"mlflow": "mlflow", "mlflow_auth": "mlflow", "optuna": "optuna"}
"""Databases and the roles that own them, as databases.sh makes them."""
MANIFEST, OBJECTS, RUNS = "manifest.json", "objects.tar", "runs.tar"
READER = "backup"
"""The role that reads every database."""

PASSPHRASE = "BACKUP_PASSPHRASE"
ROUNDS = 600_000
CIPHER = ("openssl", "enc", "-aes-256-ctr", "-pbkdf2", "-iter", str(ROUNDS), "-md", "sha256", "-pass", f"env:{PASSPHRASE}")


def save(folder: Path, *, runs: Path | None = None) -> Path:
    """Make a backup in a folder and return it.

    Args:
        folder: where backups are kept.
        runs: the run store, to be saved as well; None leaves it out. Runs that are training are saved as they are at that moment.
    """
    os.umask(0o077)  # the dumps hold password hashes
    folder.mkdir(parents=True, exist_ok=True)
    name = time.strftime("obowlab-%Y%m%dT%H%M%SZ", time.gmtime())
    beside = folder / f".{name}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        for database in OWNERS:
            path = beside / f"{database}.dump"
            _call("pg_dump", "--format=custom", f"--file={path}", database)
            _call("pg_restore", "--list", str(path))
        objects, size = _save_objects(beside / OBJECTS)
        if runs is not None:
            with tarfile.open(beside / RUNS, "w") as archive:
                archive.add(runs, arcname=".")
        if os.environ.get(PASSPHRASE):
            for path in sorted(beside.iterdir()):
                _call(*CIPHER, "-salt", "-in", str(path), "-out", f"{path}.enc")
                path.unlink()
        paths = sorted(beside.iterdir())
        files = {path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)} for path in paths}
        manifest = {"version": VERSION, "created_at": time.time(), "objects": objects, "object_bytes": size, "files": files}
        if os.environ.get(PASSPHRASE):
            manifest["salt"] = os.urandom(16).hex()
            manifest["signature"] = _signature(manifest)
        (beside / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        beside.rename(folder / name)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    total = sum(path.stat().st_size for path in (folder / name).iterdir())
    print(f"{folder / name}: {len(OWNERS)} databases, {objects} objects, {total / 2**20:.1f} MiB")
    return folder / name


def check(backup: Path) -> dict[str, Any]:
    """Return the manifest of a backup whose files are what it says.

    Raises:
        SystemExit: it is no backup, of another version, or damaged.
    """
    try:
        manifest: dict[str, Any] = json.loads((backup / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SystemExit(f"{backup} is no backup: it has no {MANIFEST}.") from None
    if manifest.get("version") != VERSION:
        raise SystemExit(f"{backup} is a backup of version {manifest.get('version')}; this script reads version {VERSION}.")
    encrypted = "signature" in manifest
    if encrypted and not os.environ.get(PASSPHRASE):
        raise SystemExit(f"{backup} is encrypted: set {PASSPHRASE} in .env. Nothing was changed.")
    if not encrypted and os.environ.get(PASSPHRASE):
        raise SystemExit(
            f"{backup} is neither encrypted nor signed: to restore it, empty {PASSPHRASE} in .env. Nothing was changed."
        )
    if encrypted and not hmac.compare_digest(str(manifest["signature"]), _signature(manifest)):
        raise SystemExit(f"{backup} is damaged, or was made with another {PASSPHRASE}. Nothing was changed.")
    ending = ".enc" if encrypted else ""
    for name in (f"{each}{ending}" for each in (*(f"{database}.dump" for database in OWNERS), OBJECTS)):
        if name not in manifest["files"]:
            raise SystemExit(f"{backup} is damaged: {MANIFEST} does not name {name}. Nothing was changed.")
    for name, file in manifest["files"].items():
        path = backup / Path(name).name
        if not path.is_file() or path.stat().st_size != file["bytes"] or _digest(path) != file["sha256"]:
            raise SystemExit(f"{backup} is damaged: {name} is missing or not what {MANIFEST} says. Nothing was changed.")
    return manifest


def restore(backup: Path, *, runs: Path | None = None) -> None:
    """Make the databases and the object store what they were; what came later is gone.

    Args:
        backup: a folder that `save` made.
        runs: the run store, to be put back as well: its files are written over, files that came later stay.

    Raises:
        SystemExit: the backup is damaged or has no run store; nothing was changed then.
    """
    manifest = check(backup)
    if runs is not None:
        if not {RUNS, f"{RUNS}.enc"} & set(manifest["files"]):
            raise SystemExit(f"{backup} was made without --runs: it has no run store. Nothing was changed.")
        _refuse_strays(backup / RUNS, folder=runs)
    for database, owner in OWNERS.items():
        _call("dropdb", "--if-exists", "--force", database)
        _call("createdb", f"--owner={owner}", database)
        rights = f"REVOKE ALL ON DATABASE {database} FROM PUBLIC; GRANT CONNECT ON DATABASE {database} TO {READER}"
        _call("psql", "--quiet", "--no-psqlrc", "--dbname=postgres", f"--command={rights}")
        words = ("--exit-on-error", "--single-transaction", "--no-owner", f"--role={owner}", f"--dbname={database}")
        with _opened(backup / f"{database}.dump") as dump:
            _call("pg_restore", *words, stdin=dump)
    objects = _restore_objects(backup / OBJECTS)
    if runs is not None:
        with _opened(backup / RUNS) as file, tarfile.open(fileobj=file, mode="r|") as archive:
            archive.extractall(runs, filter="data")
    print(f"{backup}: {len(OWNERS)} databases and {objects} objects are as they were")


def _save_objects(path: Path) -> tuple[int, int]:
    """Write every object of the bucket to an archive; return their number and bytes."""
    store, count, total = _store(), 0, 0
    with tarfile.open(path, "w") as archive:
        for key in _keys(store):
            found = store.get_object(Bucket=BUCKET, Key=key)
            member = tarfile.TarInfo(key)
            member.size, member.mtime = found["ContentLength"], found["LastModified"].timestamp()
            archive.addfile(member, found["Body"])  # raises when the body is shorter than it said
            count, total = count + 1, total + member.size
    return count, total


def _restore_objects(path: Path) -> int:
    """Make the bucket hold exactly what an archive holds; return the number of objects."""
    store = _store()
    if BUCKET not in [bucket["Name"] for bucket in store.list_buckets()["Buckets"]]:
        store.create_bucket(Bucket=BUCKET)
    wanted = set()
    with _opened(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            body = archive.extractfile(member)
            if body is None:
                raise SystemExit(f"{path} holds something that is no object: {member.name!r}.")
            store.upload_fileobj(_Once(body), BUCKET, member.name)
            wanted.add(member.name)
    for key in set(_keys(store)) - wanted:
        store.delete_object(Bucket=BUCKET, Key=key)
    return len(wanted)


def _refuse_strays(path: Path, *, folder: Path) -> None:
    """Refuse an archive with a member that would leave the folder it is unpacked to."""
    with _opened(path) as file, tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            try:
                tarfile.data_filter(member, str(folder))
            except tarfile.FilterError as error:
                raise SystemExit(f"{path} is not what `save` wrote: {error}. Nothing was changed.") from None


def _keys(store: Any) -> list[str]:
    pages = store.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
    return [entry["Key"] for page in pages for entry in page.get("Contents", [])]


def _store() -> Any:
    import boto3
    from botocore.config import Config

    return boto3.client("s3", config=Config(s3={"addressing_style": "path"}))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Once:
    """A file that can only be read, once: what is decrypted cannot be read again, and boto3 would try."""

    def __init__(self, file: IO[bytes]) -> None:
        self.read = file.read


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """Yield the content of a file of a backup, decrypted where it is encrypted."""
    sealed = path.with_name(f"{path.name}.enc")
    if not sealed.exists():
        with path.open("rb") as file:
            yield file
        return
    with subprocess.Popen([*CIPHER, "-d", "-in", str(sealed)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process.stdout


def _signature(manifest: dict[str, Any]) -> str:
    """Return the HMAC of a manifest, its signature left out, with a key of the passphrase."""
    rest = {key: value for key, value in manifest.items() if key != "signature"}
    key = hashlib.pbkdf2_hmac("sha256", os.environ[PASSPHRASE].encode(), bytes.fromhex(manifest["salt"]), ROUNDS)
    return hmac.new(key, json.dumps(rest, sort_keys=True).encode(), "sha256").hexdigest()


def _call(*words: str, stdin: IO[bytes] | int = subprocess.DEVNULL) -> None:
    done = subprocess.run(words, stdin=stdin, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{words[0]} failed: {' '.join(done.stderr.split())[:500]}")


def main(words: list[str]) -> None:
    """Do what the words say."""
    parser = argparse.ArgumentParser(description="Save the databases and the object store, and put them back.")
    parser.add_argument("action", choices=["save", "check", "restore"])
    parser.add_argument("folder", type=Path, help="where backups are kept; for check and restore, the backup")
    parser.add_argument("--runs", type=Path, metavar="RUNS_ROOT", help="the run store as well")
    given = parser.parse_args(words)
    if given.action == "save":
        save(given.folder, runs=given.runs)
    elif given.action == "check":
        manifest = check(given.folder)
        print(f"{given.folder} is whole: {manifest['objects']} objects, {len(manifest['files'])} files")
    else:
        restore(given.folder, runs=given.runs)


if __name__ == "__main__":
    main(sys.argv[1:])
