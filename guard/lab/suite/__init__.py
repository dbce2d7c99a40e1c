"""The suite: its SAEs declared, trained on harvested activations, kept and measured."""
