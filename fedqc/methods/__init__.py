"""QC methods behind one plug-in point, one method a file."""
