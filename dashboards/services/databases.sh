#!/bin/sh
# Run by the PostgreSQL image on an empty volume: a role and databases for MLflow, one of each for the studies, and a role for
# backups, which reads everything. What is there stays, so that it can be run again (docs/services.md, Upgrade).
# psql reads the passwords from the environment itself, so that they appear on no command line.
set -eu
export PGPASSWORD="$POSTGRES_PASSWORD"
psql --quiet --no-psqlrc --set=ON_ERROR_STOP=1 --username=postgres --dbname=postgres <<'SQL'
\getenv mlflow_password MLFLOW_DATABASE_PASSWORD
\getenv studies_password STUDIES_DATABASE_PASSWORD
\getenv backup_password BACKUP_DATABASE_PASSWORD
SELECT format('CREATE ROLE %I LOGIN', name) FROM unnest(ARRAY['mlflow', 'optuna', 'backup']) AS name
WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = name) \gexec
ALTER ROLE mlflow PASSWORD :'mlflow_password';
ALTER ROLE optuna PASSWORD :'studies_password';
ALTER ROLE backup PASSWORD :'backup_password';
GRANT pg_read_all_data TO backup;
-- mlflow_auth is of its own: the login app keeps a second history of schema versions, in a table of the same name.
SELECT format('CREATE DATABASE %I OWNER %I', name, owner)
FROM (VALUES ('mlflow', 'mlflow'), ('mlflow_auth', 'mlflow'), ('optuna', 'optuna')) AS wanted (name, owner)
WHERE NOT EXISTS (SELECT FROM pg_database WHERE datname = name) \gexec
REVOKE ALL ON DATABASE postgres, mlflow, mlflow_auth, optuna FROM PUBLIC;
GRANT CONNECT ON DATABASE mlflow, mlflow_auth, optuna TO backup;
SQL
