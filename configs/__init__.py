"""Configuration: frozen dataclasses (schema.py), YAML recipes, and how the two meet (load.py)."""
