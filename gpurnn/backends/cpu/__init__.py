"""The backend ``"cpu"``: compiled code, called through ctypes."""
