"""Celery only: the app (``celery -A workers``), thin tasks over ``curator.stages``, the schedule."""
