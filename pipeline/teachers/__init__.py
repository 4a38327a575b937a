"""Teachers: the `Teacher` protocol and the engines behind it."""
