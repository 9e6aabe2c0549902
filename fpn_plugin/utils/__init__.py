"""Seeds, safe reading of pickles, files of metrics and whole writes: used by every other room."""
