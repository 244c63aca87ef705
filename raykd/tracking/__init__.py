"""The journal of a run, and MLflow brought up to it. The only folder that imports mlflow."""
