"""The tables of the papers, made again on any data set: `fedqc reproduce NAME`."""
