"""Filters: each turns a row into scores and a reason to reject; one file each."""
