"""A consortium on one machine: made from a public data set, run by the very code that a real one runs."""
