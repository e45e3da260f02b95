"""A model behind HTTP: a page to drop photos on, and an API for programs (`vitft serve`)."""
