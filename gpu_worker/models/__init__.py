"""The models that can be served."""
