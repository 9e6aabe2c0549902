"""The commands of fpn-plugin: one file each, named as the command."""
