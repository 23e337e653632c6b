"""Between the processes of one host: messages, sockets, identities and shared blocks."""
