"""Conditionals made of normalizing flows."""
