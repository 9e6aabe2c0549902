"""The commands of ``fpn-plugin``, a file each.

The file ``NAME.py`` has ``NAME_main(argv)``, which runs the command with a list of arguments, those
of the command line by default. It raises a :class:`UserError` for what cannot be used. The
docstring of the file is the command's help.
"""
