"""All that can be checked before a step is run: `make doctor`."""
