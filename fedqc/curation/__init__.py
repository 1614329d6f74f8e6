"""From scores to decisions about annotations."""
