"""Doors to other libraries. Each imports its library when it is itself imported, and needs an extra.

See docs/interop.md.
"""
