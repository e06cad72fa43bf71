"""THE STEP: TensorFlow and Keras; never Ray, MLflow or Hydra. Usable alone in a notebook."""
