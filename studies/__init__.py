"""Evidence, figures and measurements: python -m studies.NAME."""
