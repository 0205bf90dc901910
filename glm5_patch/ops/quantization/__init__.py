"""Rounding the indexer's queries and keys to fp8."""
