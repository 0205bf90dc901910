"""Turning a part of each head by its position."""
