"""Random seeds, safe pickles, files of metrics and atomic writes, for all other packages."""
