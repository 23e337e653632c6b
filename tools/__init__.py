"""The command line, one file a command. Importing this loads nothing; `cli` imports a command when it is called."""
