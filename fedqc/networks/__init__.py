"""Network architectures, one published architecture a file."""
