"""Objectives: one file each, known to the trainer through one protocol."""
