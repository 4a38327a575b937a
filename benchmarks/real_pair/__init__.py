"""A real model and students with fewer of its layers, trained from a cache and from the teacher."""
