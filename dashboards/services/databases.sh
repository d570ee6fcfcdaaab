#!/bin/sh
# Run once by the PostgreSQL image, on an empty volume: a role and databases for MLflow, one of each for the studies.
# psql reads the passwords from the environment itself, so that they appear on no command line.
set -eu
export PGPASSWORD="$POSTGRES_PASSWORD"
psql --quiet --no-psqlrc --set=ON_ERROR_STOP=1 --username=postgres --dbname=postgres <<'SQL'
\getenv mlflow_password MLFLOW_DATABASE_PASSWORD
\getenv studies_password STUDIES_DATABASE_PASSWORD
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE ROLE optuna LOGIN PASSWORD :'studies_password';
CREATE DATABASE mlflow OWNER mlflow;
-- Of its own: the login app keeps a second history of schema versions, in a table of the same name.
CREATE DATABASE mlflow_auth OWNER mlflow;
CREATE DATABASE optuna OWNER optuna;
REVOKE ALL ON DATABASE postgres, mlflow, mlflow_auth, optuna FROM PUBLIC;
SQL
