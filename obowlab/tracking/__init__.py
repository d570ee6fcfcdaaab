"""The window: MLflow, mirrored from run folders. The only package that imports mlflow."""
