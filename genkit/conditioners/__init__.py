"""What conditions a generator: text (and, with later systems, pictures) turned into vectors and tokens."""
