"""A distributed training orchestrator for TensorFlow: one engine per folder.

    spec/      WHAT to run: config, plan, paths, messages     standard library (Hydra: config.py)
    control/   WHERE it runs and what happens when it breaks       Ray, only in ray_*.py
    train/     THE STEP: model, data, gradients, checkpoints       TensorFlow and Keras
    track/     THE RECORD: journal, MLflow as its projection       MLflow, only in mlflow_*.py

Above the folders, what knows several of them: a file for each command, and what commands share.

    __main__.py   the command line: compose, plan, then print or launch; exit codes
    driver.py training.py                         `train`: overrides -> plan; one start of a run
    runs.py lease.py resumption.py job_code.py    which run a command goes on with, and from where
    signals.py patience.py guardian.py            how a run ends: asked, out of disk, killed
    screen.py summary.py listing.py comparison.py what is said of runs
    verify*.py verdict.py   chaos*.py   sweep*.py   doctor*.py duration.py   the other commands
    conversion.py weights.py   keeping.py   runs_command.py   serving.py

The flow, one arrow per boundary:

    argv -> RunConfig -> RunPlan -> Supervisor -> WorkerGroup -> agent -> worker -> block of steps
    worker -> Message -> agent -> WorkerGroup.poll -> Supervisor -> Journal -> MLflow

The driver never imports TensorFlow; workers never import Ray, MLflow or Hydra.
"""
