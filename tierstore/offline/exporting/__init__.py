"""A checkpoint written anew: files of parts, rows that training touched, a folder that appears whole."""
