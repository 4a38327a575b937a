"""`coldstill demo --vision`: images, a teacher that sees, capture, three students and their measurement."""
