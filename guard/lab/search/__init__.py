"""The search: which SAEs and which of their latents tell risk, and how surely."""
