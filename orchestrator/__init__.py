"""A distributed training orchestrator for TensorFlow: one engine per folder.

    spec/      WHAT to run: config, plan, paths, messages     standard library (Hydra: config.py)
    control/   WHERE it runs and what happens when it breaks       Ray, only in ray_*.py
    train/     THE STEP: model, data, gradients, checkpoints       TensorFlow and Keras
    track/     THE RECORD: journal, MLflow as its projection       MLflow, only in mlflow_*.py

Above these, what knows several of them: files for `train` and the small commands, a folder for
each large one.

    __main__.py   the command line: compose, plan, then print or launch; exit codes
    driver.py training.py                         `train`: overrides -> plan; one start of a run
    runs.py lease.py resumption.py job_code.py    which run a command goes on with, and from where
    signals.py patience.py guardian.py reaper.py  how a run ends: asked, out of disk, killed
    screen*.py terminal.py console.py summary.py  what is said of a run while it goes on
    runs_command.py listing.py status.py logs.py stopping.py asking.py comparison.py    `runs`
    conversion.py weights.py   keeping.py   serving.py      `weights`   `up` and `down`   `serve`
    verify/   chaos/   sweep/   doctor/                     the commands of these names

The flow, one arrow per boundary:

    argv -> RunConfig -> RunPlan -> Supervisor -> WorkerGroup -> agent -> worker -> block of steps
    worker -> Message -> agent -> WorkerGroup.poll -> Supervisor -> Journal -> MLflow

The driver never imports TensorFlow; workers never import Ray, MLflow or Hydra.
"""
