"""Soft targets on disk: stores, encodings and corpora."""
