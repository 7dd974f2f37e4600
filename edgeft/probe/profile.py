"""Figures of a profile from times of synthetic models."""
