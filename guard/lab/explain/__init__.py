"""Explaining: what each latent stands for, who says so, and whether it holds."""
