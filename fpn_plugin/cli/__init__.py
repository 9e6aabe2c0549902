"""The commands of ``fpn-plugin``, a file each, named as the command."""
