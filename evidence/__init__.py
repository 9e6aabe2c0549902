"""What shows that the plugin keeps its promises: run from a checkout, not part of the wheel."""
