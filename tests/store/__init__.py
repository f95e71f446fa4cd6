"""Stores and sources."""
