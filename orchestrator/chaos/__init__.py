"""A run under faults that must leave what an undisturbed one leaves: `make chaos`."""
