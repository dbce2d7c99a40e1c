"""The heads: fitted on labelled texts, evaluated, calibrated and built into a pack."""
