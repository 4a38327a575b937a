"""Ways of drawing from a teacher's tail at equal bytes: noise of the gradient, and quality of students."""
