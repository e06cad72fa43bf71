"""THE RECORD: the journal of a run and MLflow as its projection. MLflow only in `mlflow_*.py`."""
