"""Quality of students trained from caches of several sizes."""
