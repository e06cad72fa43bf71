"""A distributed training orchestrator for TensorFlow: one engine per folder.

    spec/      WHAT to run: config, plan, paths, messages     standard library (Hydra: config.py)
    control/   WHERE it runs and what happens when it breaks       Ray, only in ray_*.py
    train/     THE STEP: model, data, gradients, checkpoints       TensorFlow and Keras
    track/     THE RECORD: journal, MLflow as its projection       MLflow, only in mlflow_*.py

    __main__.py   the command line: compose, plan, then print or launch; exit codes
    driver.py     one training, from plan to exit code: the only file that knows all four folders
    screen.py     what the driver draws

The flow, one arrow per boundary:

    argv -> RunConfig -> RunPlan -> Supervisor -> WorkerGroup -> agent -> worker -> block of steps
    worker -> Message -> agent -> WorkerGroup.poll -> Supervisor -> Journal -> MLflow

The driver never imports TensorFlow; workers never import Ray, MLflow or Hydra.
"""
