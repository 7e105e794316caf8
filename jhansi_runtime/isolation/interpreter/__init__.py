"""Modules for the interpreter of a rootfs, which finds them on its path by their own names (zygote.py)."""
