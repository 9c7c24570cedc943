"""Celery only."""
