"""One job on one device, replicas, workers and micro-batches, compared: `make verify`."""
