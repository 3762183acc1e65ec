"""Whole models in one file: ``gpurnn.save`` and ``gpurnn.load``."""

from .file import load, read_facts, save

__all__ = ["load", "read_facts", "save"]
