"""Networks that predict tokens or latents; one evaluation each, no loops."""
