"""The dataset's card: what it holds and what storage cost, for whoever receives it."""
