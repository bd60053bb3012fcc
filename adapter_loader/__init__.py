"""Fetches, checks and packs what is loaded: the base model and the adapters."""
