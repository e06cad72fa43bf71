"""Many runs of one job with other values: `make sweep`."""
