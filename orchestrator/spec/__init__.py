"""WHAT to run: config, plan, paths and messages. Standard library only."""
