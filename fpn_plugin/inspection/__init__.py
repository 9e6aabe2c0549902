"""What a model and a training do, level by level: looked at, never changed.

Its modules are imported by name: tools need one of them, and training needs another.
"""
