-- Run once, by the image of Postgres, when its volume is made: a database for MLflow beside the one for Prefect.
CREATE DATABASE mlflow OWNER likeness;
