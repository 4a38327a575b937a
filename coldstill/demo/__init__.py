"""`coldstill demo`: text, teacher, capture, three students and their measurement, on this machine without a network."""
