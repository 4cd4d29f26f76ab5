"""Preparation of the public data sets from their official downloads."""
