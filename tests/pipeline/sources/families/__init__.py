"""Chat templates in the styles of well-known model families, and random chats to render with them."""
