"""What a model and a training do, level by level. Nothing here changes either."""
