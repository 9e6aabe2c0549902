"""Showing that the plugin stands up: trainings that are killed, and that run for long."""
