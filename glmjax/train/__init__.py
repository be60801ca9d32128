"""The trainer: small models, for the parameter trees that are served."""
