"""What one training step computes, one file per objective."""
